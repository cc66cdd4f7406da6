//! Tokens of other issuers: what is read, what is refused and in which words.

use aws_lc_rs::hmac;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_FIXED_SIGNING,
    ECDSA_P521_SHA512_FIXED_SIGNING, EcdsaKeyPair, EcdsaSigningAlgorithm, Ed25519KeyPair, KeyPair,
    RSA_PKCS1_SHA256, RSA_PKCS1_SHA384, RSA_PKCS1_SHA512, RSA_PSS_SHA256, RSA_PSS_SHA384,
    RSA_PSS_SHA512, RsaEncoding, RsaKeyPair,
};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64;
use mesh_identity::jwt::{Jwks, Jwt, JwtError, MAX_JWT_BYTES};
use serde_json::{Value, json};

const NOW: u64 = 1_800_000_000;

fn unsigned(header: &Value, payload: &Value) -> String {
    let encode = |value: &Value| BASE64.encode(value.to_string());
    format!("{}.{}", encode(header), encode(payload))
}

fn signed(header: &Value, payload: &Value, sign: impl Fn(&[u8]) -> Vec<u8>) -> String {
    let text = unsigned(header, payload);
    let signature = BASE64.encode(sign(text.as_bytes()));
    format!("{text}.{signature}")
}

struct Rsa(RsaKeyPair);

impl Rsa {
    fn new() -> Self {
        Self(RsaKeyPair::generate(KeySize::Rsa2048).expect("a key"))
    }

    fn jwk(&self, extra: Value) -> Value {
        let key = self.0.public_key();
        let text = |bytes: &[u8]| BASE64.encode(bytes);
        let mut jwk = json!({
            "kty": "RSA",
            "n": text(key.modulus().big_endian_without_leading_zero()),
            "e": text(key.exponent().big_endian_without_leading_zero()),
        });
        let fields = extra.as_object().cloned().unwrap_or_default();
        jwk.as_object_mut().expect("an object").extend(fields);
        jwk
    }

    fn sign(&self, how: &'static dyn RsaEncoding, text: &[u8]) -> Vec<u8> {
        let mut signature = vec![0; self.0.public_modulus_len()];
        self.0
            .sign(how, &SystemRandom::new(), text, &mut signature)
            .expect("a signature");
        signature
    }
}

fn set(keys: &[Value]) -> Jwks {
    Jwks::parse(&json!({ "keys": keys }).to_string()).expect("a key set")
}

fn claims() -> Value {
    json!({"iss": "https://issuer.test", "sub": "me", "aud": ["a", "b"], "exp": NOW + 60})
}

fn check(keys: &Jwks, token: &str) -> Result<(), JwtError> {
    keys.verify(&Jwt::parse(token)?)
}

#[test]
fn every_algorithm_verifies_its_own_signature_and_no_other() {
    let rsa = Rsa::new();
    let rsa_ways: [(&str, &'static dyn RsaEncoding); 6] = [
        ("RS256", &RSA_PKCS1_SHA256),
        ("RS384", &RSA_PKCS1_SHA384),
        ("RS512", &RSA_PKCS1_SHA512),
        ("PS256", &RSA_PSS_SHA256),
        ("PS384", &RSA_PSS_SHA384),
        ("PS512", &RSA_PSS_SHA512),
    ];
    let keys = set(&[rsa.jwk(json!({}))]);
    for (alg, how) in rsa_ways {
        let token = signed(&json!({ "alg": alg }), &claims(), |text| {
            rsa.sign(how, text)
        });
        assert_eq!(check(&keys, &token), Ok(()), "{alg}");
        let other = if alg == "RS256" { "RS384" } else { "RS256" };
        let wrong = signed(&json!({ "alg": other }), &claims(), |text| {
            rsa.sign(how, text)
        });
        assert_eq!(
            check(&keys, &wrong),
            Err(JwtError::VerificationFail),
            "{alg}"
        );
    }
    let curves: [(&str, &str, &'static EcdsaSigningAlgorithm, usize); 3] = [
        ("ES256", "P-256", &ECDSA_P256_SHA256_FIXED_SIGNING, 32),
        ("ES384", "P-384", &ECDSA_P384_SHA384_FIXED_SIGNING, 48),
        ("ES512", "P-521", &ECDSA_P521_SHA512_FIXED_SIGNING, 66),
    ];
    for (alg, crv, algorithm, size) in curves {
        let pair = EcdsaKeyPair::generate(algorithm).expect("a key");
        let point = &pair.public_key().as_ref()[1..];
        let key = json!({"kty": "EC", "crv": crv, "x": BASE64.encode(&point[..size]), "y": BASE64.encode(&point[size..])});
        let sign = |text: &[u8]| {
            let signature = pair.sign(&SystemRandom::new(), text);
            signature.expect("a signature").as_ref().to_vec()
        };
        let token = signed(&json!({ "alg": alg }), &claims(), sign);
        assert_eq!(
            check(&set(std::slice::from_ref(&key)), &token),
            Ok(()),
            "{alg}"
        );
        let other = if alg == "ES256" { "ES384" } else { "ES256" };
        let wrong = signed(&json!({ "alg": other }), &claims(), sign);
        let verdict = check(&set(&[key]), &wrong);
        assert_eq!(
            verdict,
            Err(JwtError::KidAlgMismatch),
            "{alg}: the curve decides"
        );
    }
    let pair = Ed25519KeyPair::generate().expect("a key");
    let key =
        json!({"kty": "OKP", "crv": "Ed25519", "x": BASE64.encode(pair.public_key().as_ref())});
    let token = signed(&json!({"alg": "EdDSA"}), &claims(), |text| {
        pair.sign(text).as_ref().to_vec()
    });
    assert_eq!(check(&set(std::slice::from_ref(&key)), &token), Ok(()));
    let short = signed(&json!({"alg": "EdDSA"}), &claims(), |_| vec![1; 63]);
    assert_eq!(check(&set(&[key]), &short), Err(JwtError::Ed25519Length));
}

#[test]
fn the_public_rsa_key_is_nobody_s_secret() {
    let rsa = Rsa::new();
    let modulus = rsa.0.public_key().modulus();
    let secret = hmac::Key::new(hmac::HMAC_SHA256, modulus.big_endian_without_leading_zero());
    let token = signed(&json!({"alg": "HS256"}), &claims(), |text| {
        hmac::sign(&secret, text).as_ref().to_vec()
    });
    let plain = set(&[rsa.jwk(json!({}))]);
    assert_eq!(check(&plain, &token), Err(JwtError::VerificationFail));
    let named = set(&[rsa.jwk(json!({"alg": "RS256"}))]);
    assert_eq!(check(&named, &token), Err(JwtError::KidAlgMismatch));
}

#[test]
fn keys_are_told_apart_by_their_ids() {
    let (one, two) = (Rsa::new(), Rsa::new());
    let keys = set(&[one.jwk(json!({"kid": "1"})), two.jwk(json!({"kid": "2"}))]);
    let token = |kid: Value, rsa: &Rsa| {
        let mut header = json!({"alg": "RS256"});
        header["kid"] = kid;
        signed(&header, &claims(), |text| rsa.sign(&RSA_PKCS1_SHA256, text))
    };
    assert_eq!(check(&keys, &token(json!("2"), &two)), Ok(()));
    assert_eq!(
        check(&keys, &token(json!("1"), &two)),
        Err(JwtError::VerificationFail)
    );
    for kid in ["3", "../../etc/passwd", "1' or '1'='1"] {
        assert_eq!(
            check(&keys, &token(json!(kid), &one)),
            Err(JwtError::KidAlgMismatch)
        );
    }
    assert_eq!(
        check(&keys, &token(json!(1), &one)),
        Err(JwtError::HeaderKid)
    );
    let without = signed(&json!({"alg": "RS256"}), &claims(), |text| {
        two.sign(&RSA_PKCS1_SHA256, text)
    });
    assert_eq!(
        check(&keys, &without),
        Ok(()),
        "without an id all keys are tried"
    );
}

#[test]
fn what_is_no_token_is_refused_in_envoy_s_words() {
    let rs = json!({"alg": "RS256"});
    let of = |header: &Value, payload: &Value| format!("{}.AAAA", unsigned(header, payload));
    let raw = |header: &str, payload: &str| {
        format!("{}.{}.AAAA", BASE64.encode(header), BASE64.encode(payload))
    };
    let deep = format!("{}1{}", "[".repeat(10_000), "]".repeat(10_000));
    let cases = [
        (
            String::new(),
            "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections",
        ),
        (
            "a.b".into(),
            "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections",
        ),
        (
            "a.b.c.d".into(),
            "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections",
        ),
        (
            format!("{}.", unsigned(&json!({"alg": "none"}), &claims())),
            "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections",
        ),
        (
            "a".repeat(MAX_JWT_BYTES + 1),
            "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections",
        ),
        ("!.b.c".into(), "Jwt header is an invalid Base64url encoded"),
        (raw("{", "{}"), "Jwt header is an invalid JSON"),
        (raw("[]", "{}"), "Jwt header is an invalid JSON"),
        (
            raw(r#"{"alg":"RS256","alg":"none"}"#, "{}"),
            "Jwt header is an invalid JSON",
        ),
        (
            of(&json!({}), &claims()),
            "Jwt header [alg] field is required and must be a string",
        ),
        (
            of(&json!({"alg": 1}), &claims()),
            "Jwt header [alg] field is required and must be a string",
        ),
        (
            of(&json!({"alg": "none"}), &claims()),
            "Jwt header [alg] is not supported",
        ),
        (
            of(&json!({"alg": "rs256"}), &claims()),
            "Jwt header [alg] is not supported",
        ),
        (
            format!("{}.!!.AAAA", BASE64.encode(rs.to_string())),
            "Jwt payload is an invalid Base64url encoded",
        ),
        (
            raw(r#"{"alg":"RS256"}"#, "nonsense"),
            "Jwt payload is an invalid JSON",
        ),
        (
            raw(r#"{"alg":"RS256"}"#, r#"{"sub":"a","sub":"b"}"#),
            "Jwt payload is an invalid JSON",
        ),
        (
            raw(r#"{"alg":"RS256"}"#, r#"{"a":{"b":1,"b":2}}"#),
            "Jwt payload is an invalid JSON",
        ),
        (
            raw(r#"{"alg":"RS256"}"#, &format!("{{\"a\":{deep}}}")),
            "Jwt payload is an invalid JSON",
        ),
        (
            of(&rs, &json!({"iss": 1})),
            "Jwt payload [iss] field is not a string",
        ),
        (
            of(&rs, &json!({"sub": {}})),
            "Jwt payload [sub] field is not a string",
        ),
        (
            of(&rs, &json!({"exp": "soon"})),
            "Jwt payload [exp] field is not an integer",
        ),
        (
            of(&rs, &json!({"nbf": -1})),
            "Jwt payload [nbf] field is not a positive 64 bit integer",
        ),
        (
            of(&rs, &json!({"iat": 1e30})),
            "Jwt payload [iat] field is not a positive 64 bit integer",
        ),
        (
            of(&rs, &json!({"aud": [1]})),
            "Jwt payload [aud] field is not a string or string list",
        ),
        (
            format!("{}.A?", unsigned(&rs, &claims())),
            "Jwt signature is an invalid Base64url encoded",
        ),
    ];
    for (token, words) in cases {
        let error = Jwt::parse(&token).expect_err(words);
        assert_eq!(error.to_string(), words, "{:.200}", token);
    }
}

#[test]
fn time_and_audience_are_judged_with_some_tolerance() {
    let parse = |payload: Value| {
        Jwt::parse(&format!(
            "{}.AAAA",
            unsigned(&json!({"alg": "RS256"}), &payload)
        ))
        .expect("a token")
    };
    let token = parse(json!({"exp": NOW, "nbf": NOW - 10}));
    assert_eq!(token.check_time(NOW + 60, 60), Ok(()));
    assert_eq!(token.check_time(NOW + 61, 60), Err(JwtError::Expired));
    assert_eq!(token.check_time(NOW - 70, 60), Ok(()));
    assert_eq!(token.check_time(NOW - 71, 60), Err(JwtError::NotYetValid));
    assert_eq!(
        parse(json!({})).check_time(NOW, 0),
        Ok(()),
        "without an end it never ends"
    );
    assert_eq!(
        parse(json!({"exp": 1.5})).check_time(3, 1),
        Err(JwtError::Expired)
    );
    let wanted = |list: &[&str]| list.iter().map(|a| (*a).to_owned()).collect::<Vec<_>>();
    let token = parse(json!({"aud": "https://shop.test/"}));
    assert_eq!(token.check_audience(&[]), Ok(()));
    assert_eq!(
        token.check_audience(&wanted(&["x", "http://shop.test"])),
        Ok(())
    );
    assert_eq!(
        token.check_audience(&wanted(&["shop.test.evil"])),
        Err(JwtError::AudienceNotAllowed)
    );
    assert_eq!(
        parse(json!({})).check_audience(&wanted(&["x"])),
        Err(JwtError::AudienceNotAllowed)
    );
}

#[test]
fn key_sets_without_a_usable_key_are_refused() {
    for (text, error) in [
        ("nonsense", JwtError::JwksJson),
        ("{}", JwtError::JwksNoKeys),
        (r#"{"keys": {}}"#, JwtError::JwksBadKeys),
        (r#"{"keys": []}"#, JwtError::JwksNoValidKeys),
        (
            r#"{"keys": [{"kty": "RSA", "n": "AQAB"}, {"kty": "new"}, 1]}"#,
            JwtError::JwksNoValidKeys,
        ),
        (
            r#"{"keys": [{"kty": "EC", "crv": "P-256", "x": "AA", "y": "!!"}]}"#,
            JwtError::JwksNoValidKeys,
        ),
    ] {
        assert_eq!(Jwks::parse(text).err(), Some(error), "{text}");
    }
    let rsa = Rsa::new();
    let keys = set(&[json!({"kty": "quantum"}), rsa.jwk(json!({}))]);
    let token = signed(&json!({"alg": "RS256"}), &claims(), |text| {
        rsa.sign(&RSA_PKCS1_SHA256, text)
    });
    assert_eq!(
        check(&keys, &token),
        Ok(()),
        "a key of an unknown kind does not spoil the set"
    );
}

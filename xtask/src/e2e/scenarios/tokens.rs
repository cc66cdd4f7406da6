//! JSON web tokens: who has a good one is let in, whoever has none or a bad one is told so.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, ensure};
use rcgen::{KeyPair, PKCS_RSA_SHA256, PublicKeyData as _, SigningKey as _};
use serde_json::{Value, json};

use super::pods::wait_running;
use super::policy::{ask, client, httpbin, namespace};
use super::samples::with;
use crate::e2e::cluster::Cluster;

/// The field's demonstration token, good until 2118; its key is one of those that the sample `jwt-server` gives out.
const DEMO: &str = concat!(
    "eyJhbGciOiJSUzI1NiIsImtpZCI6IkRIRmJwb0lVcXJZOHQyenBBMnFYZkNtcjVWTzVaRXI0UnpIVV8tZW52dlEiLCJ0eXAiOiJKV1QifQ.",
    "eyJleHAiOjQ2ODU5ODk3MDAsImZvbyI6ImJhciIsImlhdCI6MTUzMjM4OTcwMCwiaXNzIjoidGVzdGluZ0BzZWN1cmUuaXN0aW8uaW8iLCJzdWIiOiJ0ZXN0aW5nQHNl",
    "Y3VyZS5pc3Rpby5pbyJ9.",
    "CfNnxWP2tcnR9q0vxyxweaF3ovQYHYZl82hAUsn21bwQd9zP7c-LS9qd_vpdLG4Tn1A15NxfCjp5f7QNBUo-KC9PJqYpgGbaXhaGx7bEdFWjcwv3nZzvc7M__ZpaCERd",
    "wU7igUmJqYGBYQ51vr2njU9ZimyKkfDe3axcyiBZde7G6dabliUosJvvKOPcKIWPccCgefSj_GNfwIip3-SsFdlR7BtbVUcqR-yv-XOxJ3Uc1MI0tz3uMiiZcyPV7sNC",
    "U4KRnemRIMHVOfuvHsU60_GhGbiSFzgPTAa9WTltbnarTbxudb_YEOx12JiwYToeX0DCPb43W1tzIBxgm8NxUg"
);

/// The same issuer and key id, but HS256, with what everybody can know as its secret: see [`FORGED`].
const FORGED_TEXT: &str = concat!(
    "eyJhbGciOiJIUzI1NiIsImtpZCI6IkRIRmJwb0lVcXJZOHQyenBBMnFYZkNtcjVWTzVaRXI0UnpIVV8tZW52dlEiLCJ0eXAiOiJKV1QifQ.",
    "eyJleHAiOjQ2ODU5ODk3MDAsImlzcyI6InRlc3RpbmdAc2VjdXJlLmlzdGlvLmlvIiwic3ViIjoidGVzdGluZ0BzZWN1cmUuaXN0aW8uaW8ifQ"
);

/// HMAC-SHA-256 of [`FORGED_TEXT`] by the public key: as PEM (SubjectPublicKeyInfo, lines of 64), and by the bytes of its modulus.
const FORGED: [&str; 2] = [
    "VdSK0cgJ2rzuLXmfMqXpPFWHAD7jh-xwsQf7r0cPgPs",
    "G88G1trT9szuv9DNl4e2I_rTLC3rNfYbZ9IWpV1EUIw",
];

const DEMO_ISSUER: &str = "testing@secure.istio.io";
pub(super) const ISSUER: &str = "walk@mesh.test";
/// An issuer whose keys are said to be where nobody may be sent to.
const NOWHERE: &str = "nowhere@mesh.test";
const AUDIENCE: &str = "walk";
const KEY_ID: &str = "walk-1";

/// Gives out the keys of the demonstration token.
const KEY_SERVER: &str = "
apiVersion: v1
kind: Service
metadata: {name: jwt-server, namespace: tokens}
spec:
  selector: {app: jwt-server}
  ports: [{name: http, port: 8000}]
---
apiVersion: v1
kind: Pod
metadata: {name: jwt-server, namespace: tokens, labels: {app: jwt-server, sidecar.istio.io/inject: 'false'}}
spec:
  terminationGracePeriodSeconds: 1
  containers: [{name: jwt-server, image: 'istio/jwt-server:0.5', ports: [{containerPort: 8000}]}]
";

/// The alphabet of RFC 4648, section 5, without padding, as tokens have it.
fn base64url(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let mut bits = [0; 4];
        bits[1..=chunk.len()].copy_from_slice(chunk);
        let bits = u32::from_be_bytes(bits);
        for at in 0..=chunk.len() {
            let sextet = bits >> (18 - 6 * at) & 63;
            text.push(char::from(ALPHABET[sextet as usize]));
        }
    }
    text
}

/// An issuer's RSA key of 2048 bits.
pub(super) struct Key(KeyPair);

impl Key {
    pub(super) fn new() -> anyhow::Result<Self> {
        let pair = KeyPair::generate_for(&PKCS_RSA_SHA256).context("making an RSA key")?;
        Ok(Self(pair))
    }

    /// The public key as a set of one.
    pub(super) fn set(&self) -> anyhow::Result<String> {
        // RSAPublicKey of RFC 8017: a sequence of two integers, of which the first has 256 bytes behind one of zero.
        let der = self.0.der_bytes();
        ensure!(
            der.len() == 270 && der[4..9] == [2, 0x82, 1, 1, 0] && der[265..] == [2, 3, 1, 0, 1],
            "not a public key of 2048 bits: {der:02x?}"
        );
        let (n, e) = (base64url(&der[9..265]), base64url(&der[267..]));
        Ok(json!({"keys": [{"kty": "RSA", "kid": KEY_ID, "n": n, "e": e}]}).to_string())
    }

    /// A token of the usual head, signed.
    pub(super) fn token(&self, claims: &Value) -> anyhow::Result<String> {
        self.signed(
            &json!({"alg": "RS256", "kid": KEY_ID, "typ": "JWT"}),
            claims,
        )
    }

    fn signed(&self, head: &Value, claims: &Value) -> anyhow::Result<String> {
        let text = unsigned(head, claims);
        let signature = self.0.sign(text.as_bytes()).context("signing a token")?;
        Ok(format!("{text}.{}", base64url(&signature)))
    }
}

fn unsigned(head: &Value, claims: &Value) -> String {
    let part = |value: &Value| base64url(value.to_string().as_bytes());
    format!("{}.{}", part(head), part(claims))
}

/// What a good token says, but for these claims.
pub(super) fn claims(other: &Value) -> anyhow::Result<Value> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let mut claims =
        json!({"iss": ISSUER, "sub": "walker", "aud": AUDIENCE, "iat": now, "exp": now + 600});
    for (name, value) in other.as_object().context("claims are an object")? {
        claims[name] = value.clone();
    }
    Ok(claims)
}

/// The rules for tokens, and who may do what with them.
fn rules(keys: &str) -> [String; 2] {
    let authentication = format!(
        "
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {{name: tokens, namespace: tokens}}
spec:
  selector: {{matchLabels: {{app: httpbin}}}}
  jwtRules:
  - issuer: {DEMO_ISSUER}
    jwksUri: http://jwt-server.tokens.svc.cluster.local:8000/
  - issuer: {NOWHERE}
    jwksUri: http://127.0.0.1:8000/
  - issuer: {ISSUER}
    audiences: [{AUDIENCE}]
    jwks: '{keys}'
    fromHeaders: [{{name: authorization, prefix: 'Bearer '}}]
    fromParams: [token]
    outputPayloadToHeader: x-payload
    outputClaimToHeaders: [{{header: x-role, claim: role}}]
"
    );
    let authorization = format!(
        "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: tokens, namespace: tokens}}
spec:
  selector: {{matchLabels: {{app: httpbin}}}}
  rules:
  - from: [{{source: {{requestPrincipals: ['{ISSUER}/walker', '{DEMO_ISSUER}/*']}}}}]
    to: [{{operation: {{paths: [/get]}}}}]
  - to: [{{operation: {{paths: [/headers]}}}}]
    when: [{{key: 'request.auth.claims[role]', values: [admin]}}]
"
    );
    [authentication, authorization]
}

/// Tokens are sent from here; it has no proxy, so that what is seen is the server's proxy alone.
const CLIENT: (&str, &str) = ("client", "tokens");
const URL: &str = "http://httpbin:8000";

/// A request with a token in the usual place.
fn bearer(token: &str) -> String {
    format!("-H 'Authorization: Bearer {token}' {URL}/get")
}

/// What a case is, the request, the status, and what the answer says.
type Case<'a> = (&'a str, String, u16, &'a str);

fn expect(cluster: &Cluster, (what, args, wanted, text): &Case<'_>) -> anyhow::Result<()> {
    let (status, body) = ask(cluster, CLIENT, args).context(what.to_string())?;
    ensure!(
        status == wanted.to_string() && body.contains(text),
        "{what}: {wanted} with {text:?} was expected, {status} came: {body}"
    );
    Ok(())
}

/// Without a policy a request needs no token, but a bad one is refused; with one, the whole table.
pub(super) fn judged(cluster: &mut Cluster) -> anyhow::Result<()> {
    let key = Key::new()?;
    let [authentication, authorization] = rules(&key.set()?);
    let texts = [
        namespace("tokens"),
        client("tokens", "client", false),
        KEY_SERVER.to_owned(),
        httpbin("tokens"),
    ];
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    with(cluster, &texts, |cluster| {
        for pod in ["client", "jwt-server", "httpbin"] {
            wait_running(cluster, "tokens", pod)?;
        }
        cluster.apply(&authentication)?;
        let demo = ("the demonstration token", bearer(DEMO), 200, "\"url\"");
        let broken = ("no token at all", bearer("a.b.c"), 401, "Jwt");
        cluster.wait("tokens to be judged", || {
            expect(cluster, &broken)?;
            expect(cluster, &demo).map(Some)
        })?;
        let none = ("without a token", format!("{URL}/get"), 200, "\"url\"");
        expect(cluster, &none)?;
        cluster.apply(&authorization)?;
        let refused = (
            "without a token",
            format!("{URL}/get"),
            403,
            "RBAC: access denied",
        );
        cluster.wait("a token to be needed", || {
            expect(cluster, &refused).map(Some)
        })?;
        let mut cases = good(&key)?;
        cases.extend([demo, broken, refused]);
        cases.extend(bad(&key)?);
        for case in &cases {
            expect(cluster, case)?;
        }
        headers(cluster, &key)?;
        long(cluster)
    })
}

/// Tokens that are what they should be.
fn good(key: &Key) -> anyhow::Result<Vec<Case<'static>>> {
    let token = key.token(&claims(&json!({}))?)?;
    let several = key.token(&claims(&json!({"aud": ["other", AUDIENCE]}))?)?;
    let skewed = key.token(&claims(&json!({"exp": seconds(-30)?}))?)?;
    let stranger = key.token(&claims(&json!({"sub": "stranger"}))?)?;
    let denied = "RBAC: access denied";
    Ok(vec![
        ("a good token", bearer(&token), 200, "\"url\""),
        (
            "a good token in a parameter",
            format!("'{URL}/get?token={token}'"),
            200,
            "\"url\"",
        ),
        ("one audience of two", bearer(&several), 200, "\"url\""),
        (
            "a clock half a minute ahead",
            bearer(&skewed),
            200,
            "\"url\"",
        ),
        ("the token of somebody else", bearer(&stranger), 403, denied),
    ])
}

/// Now and so many seconds.
fn seconds(more: i64) -> anyhow::Result<i64> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    Ok(i64::try_from(now)? + more)
}

/// Tokens that are not; the texts are Envoy's.
fn bad(key: &Key) -> anyhow::Result<Vec<Case<'static>>> {
    let with = |other: &Value| anyhow::Ok(bearer(&key.token(&claims(other)?)?));
    let good = claims(&json!({}))?;
    let head = |alg: &str, id: &str| json!({"alg": alg, "kid": id, "typ": "JWT"});
    let token = key.token(&good)?;
    let (_, signature) = token.rsplit_once('.').context("a token has three parts")?;
    let (demo, demo_signature) = DEMO.rsplit_once('.').context("a token has three parts")?;
    let altered = unsigned(&head("RS256", KEY_ID), &claims(&json!({"role": "admin"}))?);
    let none = unsigned(&head("none", KEY_ID), &good);
    // An empty third part is no part.
    let parts = "Jwt is not in the form of Header.Payload.Signature";
    let unknown = "Jwks doesn't have key to match kid or alg from Jwt";
    let fails = "Jwt verification fails";
    let other = Key::new()?.token(&good)?;
    let mut cases = vec![
        (
            "expired",
            with(&json!({"exp": seconds(-120)?}))?,
            401,
            "Jwt is expired",
        ),
        (
            "too early",
            with(&json!({"nbf": seconds(120)?}))?,
            401,
            "Jwt not yet valid",
        ),
        (
            "wrong audience",
            with(&json!({"aud": "other"}))?,
            403,
            "Audiences in Jwt are not allowed",
        ),
        (
            "no audience",
            with(&json!({"aud": []}))?,
            403,
            "Audiences in Jwt are not allowed",
        ),
        (
            "wrong issuer",
            with(&json!({"iss": "walk@mesh.tes"}))?,
            401,
            "Jwt issuer is not configured",
        ),
        (
            "another issuer's key",
            with(&json!({"iss": DEMO_ISSUER}))?,
            401,
            unknown,
        ),
        (
            "an issuer at a forbidden address",
            with(&json!({"iss": NOWHERE}))?,
            401,
            "Jwks",
        ),
        ("alg none", bearer(&format!("{none}.")), 401, parts),
        (
            "alg none, signed",
            bearer(&format!("{none}.{signature}")),
            401,
            "Jwt header [alg] is not supported",
        ),
        (
            "alg None",
            bearer(&format!("{}.", unsigned(&head("None", KEY_ID), &good))),
            401,
            parts,
        ),
        (
            "no signature",
            bearer(&format!("{}.", unsigned(&head("RS256", KEY_ID), &good))),
            401,
            "Jwt",
        ),
        (
            "unknown kid",
            bearer(&key.signed(&head("RS256", "walk-2"), &good)?),
            401,
            unknown,
        ),
        ("a stranger's key", bearer(&other), 401, fails),
        (
            "altered claims",
            bearer(&format!("{altered}.{signature}")),
            401,
            fails,
        ),
        (
            "the signature of another token",
            bearer(&format!("{demo}.{signature}")),
            401,
            fails,
        ),
        (
            "the demonstration's signature",
            bearer(&format!("{altered}.{demo_signature}")),
            401,
            fails,
        ),
        (
            "a bad token in a parameter",
            format!("'{URL}/get?token={other}'"),
            401,
            fails,
        ),
        (
            "a bad token beside a good one",
            format!("-H 'Authorization: Bearer {token}' '{URL}/get?token={other}'"),
            401,
            fails,
        ),
    ];
    for signature in FORGED {
        let token = bearer(&format!("{FORGED_TEXT}.{signature}"));
        cases.push(("HS256 with the RSA key", token, 401, fails));
    }
    Ok(cases)
}

/// Claims decide about `/headers`; what the application is told of them cannot be made up by a client.
fn headers(cluster: &Cluster, key: &Key) -> anyhow::Result<()> {
    let at = |token: &str, more: &str| {
        format!("-H 'Authorization: Bearer {token}' {more} {URL}/headers")
    };
    let user = key.token(&claims(&json!({"role": "user"}))?)?;
    let denied = "RBAC: access denied";
    expect(cluster, &("a user", at(&user, ""), 403, denied))?;
    expect(
        cluster,
        &(
            "a user who says admin",
            at(&user, "-H 'x-role: admin'"),
            403,
            denied,
        ),
    )?;
    let admin = key.token(&claims(&json!({"role": ["user", "admin"]}))?)?;
    expect(
        cluster,
        &("one role of two", at(&admin, ""), 200, "headers"),
    )?;
    let admin = key.token(&claims(&json!({"role": "admin"}))?)?;
    let (status, body) = ask(
        cluster,
        CLIENT,
        &at(&admin, "-H 'x-role: root' -H 'x-payload: mine'"),
    )?;
    let seen: Value = serde_json::from_str(&body)
        .with_context(|| format!("an admin's answer of {status}: {body}"))?;
    let of = |name: &str| seen["headers"][name].clone();
    let payload = admin.split('.').nth(1).unwrap_or_default();
    ensure!(
        of("X-Role") == json!(["admin"]) && of("X-Payload") == json!([payload]),
        "the application is told {body}"
    );
    ensure!(
        of("Authorization").is_null(),
        "the token is forwarded without being asked for: {body}"
    );
    Ok(())
}

/// A token of 40 KiB is judged; one of a megabyte is not even read, and the proxy goes on.
fn long(cluster: &Cluster) -> anyhow::Result<()> {
    let asked = |size: usize| {
        let args = format!("-H @/tmp/token {URL}/get");
        let script = format!(
            "(printf 'Authorization: Bearer '; head -c {size} /dev/zero | tr '\\0' a) > /tmp/token"
        );
        cluster.exec_in(CLIENT.1, CLIENT.0, "curl", &["sh", "-c", &script])?;
        ask(cluster, CLIENT, &args)
    };
    for (size, wanted) in [(40_000, "401"), (1_000_000, "431"), (40_000, "401")] {
        let (status, body) = asked(size)?;
        ensure!(
            status == wanted,
            "a token of {size} bytes brings {status}, not {wanted}: {body}"
        );
    }
    Ok(())
}

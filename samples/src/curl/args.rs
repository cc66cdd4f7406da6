//! curl's command line.

use std::net::IpAddr;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method};

use super::{Failure, code};

/// What one call is to do.
#[derive(Debug, Clone)]
pub(super) struct Options {
    pub(super) urls: Vec<String>,
    pub(super) method: Method,
    /// The method was given by `-X`, and so is kept on redirects.
    pub(super) method_is_fixed: bool,
    /// Headers of `-H`; without a value the header is left out.
    pub(super) headers: Vec<(HeaderName, Option<HeaderValue>)>,
    pub(super) body: Option<Bytes>,
    pub(super) user_agent: Option<String>,
    pub(super) referer: Option<String>,
    pub(super) authorization: Option<String>,
    pub(super) cookie: Option<String>,
    /// Output files of `-o` in the order of the URLs.
    pub(super) outputs: Vec<String>,
    pub(super) remote_name: bool,
    pub(super) write_out: Option<String>,
    pub(super) dump_header: Option<String>,
    pub(super) include: bool,
    pub(super) verbose: bool,
    pub(super) silent: bool,
    pub(super) show_error: bool,
    pub(super) fail: bool,
    pub(super) fail_with_body: bool,
    pub(super) fail_early: bool,
    pub(super) follow: bool,
    pub(super) max_redirects: u32,
    pub(super) compressed: bool,
    pub(super) path_as_is: bool,
    pub(super) max_time: Option<Duration>,
    pub(super) connect_timeout: Duration,
    pub(super) retries: u32,
    pub(super) retry_delay: Option<Duration>,
    pub(super) retry_refused: bool,
    pub(super) retry_all_errors: bool,
    pub(super) http: Http,
    pub(super) family: Option<Family>,
    /// `--resolve`: host (or `*`), port, addresses.
    pub(super) resolve: Vec<(String, u16, Vec<IpAddr>)>,
    /// `--connect-to`: host and port asked for (empty and none are any), host and port to use.
    pub(super) connect_to: Vec<(String, Option<u16>, String, Option<u16>)>,
    pub(super) insecure: bool,
    pub(super) ca_file: Option<String>,
    pub(super) certificate: Option<String>,
    pub(super) key: Option<String>,
}

/// Version of HTTP to speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Http {
    /// HTTP/1.1 in plain text, the best that both know under TLS.
    Any,
    One,
    OneZero,
    /// HTTP/2 from the first byte.
    Two,
}

/// Address family to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    V4,
    V6,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            urls: Vec::new(),
            method: Method::GET,
            method_is_fixed: false,
            headers: Vec::new(),
            body: None,
            user_agent: None,
            referer: None,
            authorization: None,
            cookie: None,
            outputs: Vec::new(),
            remote_name: false,
            write_out: None,
            dump_header: None,
            include: false,
            verbose: false,
            silent: false,
            show_error: false,
            fail: false,
            fail_with_body: false,
            fail_early: false,
            follow: false,
            max_redirects: 50,
            compressed: false,
            path_as_is: false,
            max_time: None,
            connect_timeout: Duration::from_secs(300),
            retries: 0,
            retry_delay: None,
            retry_refused: false,
            retry_all_errors: false,
            http: Http::Any,
            family: None,
            resolve: Vec::new(),
            connect_to: Vec::new(),
            insecure: false,
            ca_file: None,
            certificate: None,
            key: None,
        }
    }
}

/// A command line that was understood.
pub(super) enum Parsed {
    Run(Box<Options>),
    /// A text to show instead (`--help`, `--version`).
    Say(String),
}

/// Short and long name of each option, and whether a value follows.
const OPTIONS: &[(char, &str, bool)] = &[
    ('4', "ipv4", false),
    ('6', "ipv6", false),
    ('A', "user-agent", true),
    ('b', "cookie", true),
    ('D', "dump-header", true),
    ('d', "data", true),
    ('E', "cert", true),
    ('e', "referer", true),
    ('f', "fail", false),
    ('G', "get", false),
    ('H', "header", true),
    ('h', "help", false),
    ('I', "head", false),
    ('i', "include", false),
    ('k', "insecure", false),
    ('L', "location", false),
    ('m', "max-time", true),
    ('N', "no-buffer", false),
    ('O', "remote-name", false),
    ('o', "output", true),
    ('S', "show-error", false),
    ('s', "silent", false),
    ('u', "user", true),
    ('V', "version", false),
    ('v', "verbose", false),
    ('w', "write-out", true),
    ('X', "request", true),
    ('0', "http1.0", false),
    (' ', "cacert", true),
    (' ', "compressed", false),
    (' ', "connect-timeout", true),
    (' ', "connect-to", true),
    (' ', "data-ascii", true),
    (' ', "data-binary", true),
    (' ', "data-raw", true),
    (' ', "data-urlencode", true),
    (' ', "fail-early", false),
    (' ', "fail-with-body", false),
    (' ', "http1.1", false),
    (' ', "http2-prior-knowledge", false),
    (' ', "json", true),
    (' ', "key", true),
    (' ', "max-redirs", true),
    (' ', "no-progress-meter", false),
    (' ', "oauth2-bearer", true),
    (' ', "path-as-is", false),
    (' ', "resolve", true),
    (' ', "retry", true),
    (' ', "retry-all-errors", false),
    (' ', "retry-connrefused", false),
    (' ', "retry-delay", true),
    (' ', "url", true),
];

/// What is collected before the options are complete.
#[derive(Default)]
struct Draft {
    options: Options,
    data: Vec<Vec<u8>>,
    get: bool,
    head: bool,
    request: Option<Method>,
}

/// Understands curl's command line (without the program's name).
pub(super) fn parse(args: &[String]) -> Result<Parsed, Failure> {
    let mut draft = Draft::default();
    let mut rest = args.iter();
    let mut only_urls = false;
    while let Some(arg) = rest.next() {
        if only_urls || !arg.starts_with('-') || arg == "-" {
            draft.options.urls.push(arg.clone());
        } else if arg == "--" {
            only_urls = true;
        } else if let Some(long) = arg.strip_prefix("--") {
            let known = OPTIONS.iter().find(|(_, name, _)| *name == long);
            let Some((_, name, has_value)) = known else {
                return Err(unknown(arg));
            };
            let value = if *has_value {
                value(arg, None, &mut rest)?
            } else {
                String::new()
            };
            if let Some(text) = draft.take(name, &value)? {
                return Ok(Parsed::Say(text));
            }
        } else {
            for (at, letter) in arg.char_indices().skip(1) {
                let known = OPTIONS
                    .iter()
                    .find(|(short, ..)| *short == letter && letter != ' ');
                let Some((_, name, has_value)) = known else {
                    return Err(unknown(&format!("-{letter}")));
                };
                // A value may follow its letter directly.
                let tail = &arg[at + letter.len_utf8()..];
                let value = if *has_value {
                    value(arg, Some(tail), &mut rest)?
                } else {
                    String::new()
                };
                if let Some(text) = draft.take(name, &value)? {
                    return Ok(Parsed::Say(text));
                }
                if *has_value {
                    break;
                }
            }
        }
    }
    draft.finish().map(|options| Parsed::Run(Box::new(options)))
}

fn unknown(option: &str) -> Failure {
    Failure::new(
        code::USAGE,
        format!(
            "option {option}: is unknown to this curl, which is the mesh's own; --help lists what it knows"
        ),
    )
}

fn value<'a>(
    option: &str,
    tail: Option<&str>,
    rest: &mut impl Iterator<Item = &'a String>,
) -> Result<String, Failure> {
    match tail.filter(|tail| !tail.is_empty()) {
        Some(tail) => Ok(tail.into()),
        None => rest.next().cloned().ok_or_else(|| {
            Failure::new(code::USAGE, format!("option {option}: requires parameter"))
        }),
    }
}

fn bad(option: &str, value: &str, wanted: &str) -> Failure {
    Failure::new(
        code::USAGE,
        format!("option --{option}: {value:?} is not {wanted}"),
    )
}

fn seconds(option: &str, value: &str) -> Result<Duration, Failure> {
    let seconds = value
        .parse::<f64>()
        .ok()
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds.ok_or_else(|| bad(option, value, "a number of seconds"))
}

fn number<T: std::str::FromStr>(option: &str, value: &str) -> Result<T, Failure> {
    value
        .parse()
        .map_err(|_| bad(option, value, "a number in range"))
}

impl Draft {
    /// Takes one option; a text where the option asks for that alone.
    fn take(&mut self, name: &str, value: &str) -> Result<Option<String>, Failure> {
        let options = &mut self.options;
        match name {
            "help" => return Ok(Some(help())),
            "version" => {
                return Ok(Some(
                    "curl 8.16.0 (the mesh's own, a part of curl's options)\nProtocols: http https"
                        .into(),
                ));
            }
            "ipv4" => options.family = Some(Family::V4),
            "ipv6" => options.family = Some(Family::V6),
            "http1.0" => options.http = Http::OneZero,
            "http1.1" => options.http = Http::One,
            "http2-prior-knowledge" => options.http = Http::Two,
            "fail" => options.fail = true,
            "fail-early" => options.fail_early = true,
            "fail-with-body" => options.fail_with_body = true,
            "include" => options.include = true,
            "insecure" => options.insecure = true,
            "location" => options.follow = true,
            "remote-name" => options.remote_name = true,
            "show-error" => options.show_error = true,
            "silent" => options.silent = true,
            "verbose" => options.verbose = true,
            "compressed" => options.compressed = true,
            "path-as-is" => options.path_as_is = true,
            "retry-all-errors" => options.retry_all_errors = true,
            "retry-connrefused" => options.retry_refused = true,
            "get" => self.get = true,
            "head" => self.head = true,
            // Output is never held back, and there is no meter.
            "no-buffer" | "no-progress-meter" => {}
            _ => return self.take_value(name, value).map(|()| None),
        }
        Ok(None)
    }

    fn take_value(&mut self, name: &str, value: &str) -> Result<(), Failure> {
        let options = &mut self.options;
        match name {
            "url" => options.urls.push(value.into()),
            "output" => options.outputs.push(value.into()),
            "write-out" => options.write_out = Some(text_or_file(value)?),
            "dump-header" => options.dump_header = Some(value.into()),
            "user-agent" => options.user_agent = Some(value.into()),
            "referer" => options.referer = Some(value.into()),
            "cookie" if value.contains('=') => options.cookie = Some(value.into()),
            "cookie" => return Err(bad(name, value, "NAME=VALUE (cookie files are not read)")),
            "user" => options.authorization = Some(format!("Basic {}", STANDARD.encode(value))),
            "oauth2-bearer" => options.authorization = Some(format!("Bearer {value}")),
            "header" => options.headers.extend(header(value)?),
            "request" => {
                self.request = Some(
                    Method::from_bytes(value.as_bytes())
                        .map_err(|_| bad(name, value, "a method"))?,
                );
            }
            "max-time" => {
                options.max_time = Some(seconds(name, value)?).filter(|time| !time.is_zero())
            }
            "connect-timeout" => options.connect_timeout = seconds(name, value)?,
            "retry-delay" => options.retry_delay = Some(seconds(name, value)?),
            "retry" => options.retries = number(name, value)?,
            "max-redirs" => options.max_redirects = number(name, value)?,
            "cacert" => options.ca_file = Some(value.into()),
            "cert" => options.certificate = Some(value.into()),
            "key" => options.key = Some(value.into()),
            "resolve" => options.resolve.push(resolve(value)?),
            "connect-to" => options.connect_to.push(connect_to(value)?),
            "json" => {
                self.data.push(data(value, false)?);
                for (name, value) in [
                    ("content-type", "application/json"),
                    ("accept", "application/json"),
                ] {
                    options.headers.push((
                        HeaderName::from_static(name),
                        Some(HeaderValue::from_static(value)),
                    ));
                }
            }
            "data" | "data-ascii" => self.data.push(data(value, true)?),
            "data-binary" => self.data.push(data(value, false)?),
            "data-raw" => self.data.push(value.as_bytes().to_vec()),
            "data-urlencode" => self.data.push(urlencode(value)?),
            other => return Err(unknown(&format!("--{other}"))),
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Options, Failure> {
        let mut options = self.options;
        if options.urls.is_empty() {
            return Err(Failure::new(code::USAGE, "(2) no URL specified"));
        }
        if !self.data.is_empty() {
            let body = self.data.join(&b'&');
            if self.get {
                let query = String::from_utf8(body)
                    .map_err(|_| Failure::new(code::USAGE, "the data of -G is not text"))?;
                for url in &mut options.urls {
                    url.push(if url.contains('?') { '&' } else { '?' });
                    url.push_str(&query);
                }
            } else {
                options.method = Method::POST;
                options.body = Some(body.into());
            }
        }
        if self.head {
            if options.body.is_some() {
                return Err(Failure::new(
                    code::USAGE,
                    "You can only select one HTTP request method: -d and -I exclude each other",
                ));
            }
            options.method = Method::HEAD;
            options.include = true;
        }
        if let Some(method) = self.request.take() {
            options.method = method;
            options.method_is_fixed = true;
        }
        Ok(options)
    }
}

fn help() -> String {
    let mut text = String::from(
        "Usage: curl [options...] <url>...\nThis is the mesh's own curl. It knows these options:\n",
    );
    for (short, long, has_value) in OPTIONS {
        let short = if *short == ' ' {
            "    ".into()
        } else {
            format!("-{short}, ")
        };
        text.push_str(&format!(
            " {short}--{long}{}\n",
            if *has_value { " <value>" } else { "" }
        ));
    }
    text
}

/// The text itself, or after an `@` what the file has.
fn text_or_file(value: &str) -> Result<String, Failure> {
    match value.strip_prefix('@') {
        Some(file) => String::from_utf8(read(file)?)
            .map_err(|_| Failure::new(code::READ, format!("{file} is not text"))),
        None => Ok(value.into()),
    }
}

fn read(file: &str) -> Result<Vec<u8>, Failure> {
    let path = if file == "-" { "/dev/stdin" } else { file };
    std::fs::read(path)
        .map_err(|error| Failure::new(code::READ, format!("Failed to open {file}: {error}")))
}

/// Data of `-d`: a file's line ends go, as with curl.
fn data(value: &str, strip: bool) -> Result<Vec<u8>, Failure> {
    let Some(file) = value.strip_prefix('@') else {
        return Ok(value.as_bytes().to_vec());
    };
    let mut bytes = read(file)?;
    if strip {
        bytes.retain(|byte| !matches!(byte, b'\r' | b'\n' | 0));
    }
    Ok(bytes)
}

/// Data of `--data-urlencode`: `content`, `=content`, `name=content`, `@file`, `name@file`.
fn urlencode(value: &str) -> Result<Vec<u8>, Failure> {
    let (name, content) = match value.find(['=', '@']) {
        Some(at) if value[at..].starts_with('@') => (&value[..at], read(&value[at + 1..])?),
        Some(at) => (&value[..at], value.as_bytes()[at + 1..].to_vec()),
        None => ("", value.as_bytes().to_vec()),
    };
    let mut encoded = if name.is_empty() {
        String::new()
    } else {
        format!("{name}=")
    };
    for byte in content {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                encoded.push(char::from(byte))
            }
            other => encoded.push_str(&format!("%{other:02X}")),
        }
    }
    Ok(encoded.into_bytes())
}

/// A header of `-H`: `Name: value`, `Name:` (leave it out), `Name;` (send it empty), or `@file` with one a line.
fn header(value: &str) -> Result<Vec<(HeaderName, Option<HeaderValue>)>, Failure> {
    if let Some(file) = value.strip_prefix('@') {
        let text = String::from_utf8_lossy(&read(file)?).into_owned();
        let lines = text.lines().filter(|line| !line.trim().is_empty());
        return Ok(lines
            .map(one_header)
            .collect::<Result<Vec<_>, _>>()?
            .into_iter()
            .flatten()
            .collect());
    }
    Ok(one_header(value)?.into_iter().collect())
}

fn one_header(line: &str) -> Result<Option<(HeaderName, Option<HeaderValue>)>, Failure> {
    let wrong = || bad("header", line, "NAME: VALUE");
    let (name, value) = match line.split_once(':') {
        Some((name, value)) => (name, Some(value.trim()).filter(|value| !value.is_empty())),
        None => (line.strip_suffix(';').ok_or_else(wrong)?, Some("")),
    };
    let name = HeaderName::from_bytes(name.trim().as_bytes()).map_err(|_| wrong())?;
    let value = value
        .map(HeaderValue::try_from)
        .transpose()
        .map_err(|_| wrong())?;
    Ok(Some((name, value)))
}

/// `[+]HOST:PORT:ADDRESS[,ADDRESS]...`
fn resolve(value: &str) -> Result<(String, u16, Vec<IpAddr>), Failure> {
    let wrong = || bad("resolve", value, "HOST:PORT:ADDRESS[,ADDRESS]");
    let mut parts = value.trim_start_matches('+').splitn(3, ':');
    let (Some(host), Some(port), Some(addresses)) = (parts.next(), parts.next(), parts.next())
    else {
        return Err(wrong());
    };
    let address = |text: &str| text.trim_matches(['[', ']']).parse().map_err(|_| wrong());
    let addresses = addresses
        .split(',')
        .map(address)
        .collect::<Result<Vec<_>, _>>()?;
    Ok((
        host.to_ascii_lowercase(),
        port.parse().map_err(|_| wrong())?,
        addresses,
    ))
}

/// `HOST1:PORT1:HOST2:PORT2`, each part may be empty.
fn connect_to(value: &str) -> Result<(String, Option<u16>, String, Option<u16>), Failure> {
    let wrong = || bad("connect-to", value, "HOST1:PORT1:HOST2:PORT2");
    let parts: Vec<_> = value.split(':').collect();
    let [host, port, to, to_port] = parts.as_slice() else {
        return Err(wrong());
    };
    let port_of = |text: &str| {
        if text.is_empty() {
            Ok(None)
        } else {
            text.parse().map(Some).map_err(|_| wrong())
        }
    };
    Ok((
        host.to_ascii_lowercase(),
        port_of(port)?,
        (*to).into(),
        port_of(to_port)?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(args: &[&str]) -> Options {
        match parse(&args.iter().map(|arg| (*arg).to_owned()).collect::<Vec<_>>()) {
            Ok(Parsed::Run(options)) => *options,
            Ok(Parsed::Say(text)) => panic!("{text}"),
            Err(failure) => panic!("{failure}"),
        }
    }

    fn failure(args: &[&str]) -> Failure {
        parse(&args.iter().map(|arg| (*arg).to_owned()).collect::<Vec<_>>())
            .err()
            .unwrap()
    }

    #[test]
    fn letters_join_and_values_follow() {
        let options = options(&[
            "-sSo/dev/null",
            "-w",
            "%{http_code}\\n",
            "-H",
            "end-user: jason",
            "-m2.5",
            "http://a",
            "b",
        ]);
        assert!(options.silent && options.show_error);
        assert_eq!(options.outputs, ["/dev/null"]);
        assert_eq!(options.write_out.as_deref(), Some("%{http_code}\\n"));
        assert_eq!(options.headers[0].1.as_ref().unwrap(), "jason");
        assert_eq!(options.max_time, Some(Duration::from_millis(2500)));
        assert_eq!(options.urls, ["http://a", "b"]);
    }

    #[test]
    fn data_makes_a_post_or_a_query() {
        let post = options(&["-d", "a=1", "--data-urlencode", "b=x y", "http://h"]);
        assert_eq!(
            (post.method, post.body.as_deref()),
            (Method::POST, Some(&b"a=1&b=x%20y"[..]))
        );
        let get = options(&["-G", "-d", "a=1", "http://h/?q"]);
        assert_eq!(
            (get.method, get.urls[0].as_str()),
            (Method::GET, "http://h/?q&a=1")
        );
        assert_eq!(
            options(&["-X", "DELETE", "http://h"]).method,
            Method::DELETE
        );
        assert!(options(&["-I", "http://h"]).include);
    }

    #[test]
    fn headers_can_be_left_out_or_empty() {
        let options = options(&["-H", "accept:", "-H", "x-empty;", "http://h"]);
        assert_eq!(options.headers[0].1, None);
        assert_eq!(options.headers[1].1.as_ref().unwrap(), "");
    }

    #[test]
    fn what_is_not_known_is_refused_by_name() {
        for (args, word) in [
            (vec!["--ftp-pasv", "http://h"], "--ftp-pasv"),
            (vec!["-Z", "http://h"], "-Z"),
            (vec!["-m"], "-m"),
            (vec!["-m", "x", "http://h"], "max-time"),
            (vec!["--resolve", "x", "http://h"], "resolve"),
            (vec![], "URL"),
        ] {
            let failure = failure(&args);
            assert_eq!(failure.code, code::USAGE);
            assert!(failure.message.contains(word), "{failure}");
        }
    }
}

//! What the applet shows: heads, bodies, `-w`, errors.

use std::fs::File;
use std::io::Write;

use bytes::Bytes;
use flate2::write::{MultiGzDecoder, ZlibDecoder};
use http::header::CONTENT_ENCODING;
use http::{HeaderMap, Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;

use super::args::Options;
use super::connect::Target;
use super::{Facts, Failure, code, reason, version_text};

type Sink = Box<dyn Write + Send>;

/// How the body's bytes become what is shown.
enum Body {
    Plain(Sink),
    Gzip(MultiGzDecoder<Sink>),
    Deflate(ZlibDecoder<Sink>),
    Ended,
}

/// Where one transfer's response goes.
pub(super) struct Output {
    body: Body,
    include: bool,
    verbose: bool,
    heads: Option<Sink>,
}

fn unwritten(error: &std::io::Error) -> Failure {
    Failure::new(
        code::WRITE,
        format!("Failure writing output to destination: {error}"),
    )
}

/// Standard output for `-`, else a new file.
fn sink(path: &str) -> Result<Sink, Failure> {
    if path == "-" {
        return Ok(Box::new(std::io::stdout()));
    }
    let file = File::create(path)
        .map_err(|error| Failure::new(code::WRITE, format!("Failed to open {path}: {error}")))?;
    Ok(Box::new(file))
}

impl Output {
    /// Opens what the options name for the URL with this index.
    pub(super) fn open(options: &Options, index: usize, target: &Target) -> Result<Self, Failure> {
        let path = match options.outputs.get(index) {
            Some(path) => path.as_str(),
            None if options.remote_name => match target
                .uri
                .path()
                .rsplit('/')
                .next()
                .filter(|name| !name.is_empty())
            {
                Some(name) => name,
                None => return Err(Failure::new(code::WRITE, "Remote filename has no length")),
            },
            None => "-",
        };
        Ok(Self {
            body: Body::Plain(sink(path)?),
            include: options.include,
            verbose: options.verbose,
            heads: options.dump_header.as_deref().map(sink).transpose()?,
        })
    }

    /// Shows the request's head under `-v`.
    pub(super) fn request_head(&self, request: &Request<Full<Bytes>>) {
        if self.verbose {
            let path = request
                .uri()
                .path_and_query()
                .map_or("/", |path| path.as_str());
            eprintln!("> {} {path} HTTP/1.1", request.method());
            for (name, value) in request.headers() {
                eprintln!("> {name}: {}", String::from_utf8_lossy(value.as_bytes()));
            }
            eprintln!(">");
        }
    }

    /// Shows the response's head where the options ask for it.
    pub(super) fn response_head(&mut self, response: &Response<Incoming>) -> Result<(), Failure> {
        let (version, status) = (response.version(), response.status());
        let mut head = vec![format!(
            "HTTP/{} {} {}",
            version_text(version),
            status.as_u16(),
            reason(status, version)
        )];
        for (name, value) in response.headers() {
            head.push(format!(
                "{name}: {}",
                String::from_utf8_lossy(value.as_bytes())
            ));
        }
        head.push(String::new());
        if self.verbose {
            for line in &head {
                eprintln!("< {line}");
            }
        }
        let text: String = head.iter().map(|line| format!("{line}\r\n")).collect();
        if self.include
            && let Body::Plain(sink) = &mut self.body
        {
            sink.write_all(text.as_bytes())
                .map_err(|error| unwritten(&error))?;
        }
        if let Some(sink) = &mut self.heads {
            sink.write_all(text.as_bytes())
                .map_err(|error| unwritten(&error))?;
        }
        Ok(())
    }

    /// Prepares for a compressed body, where the options asked for one.
    pub(super) fn expect_encoding(&mut self, options: &Options, headers: &HeaderMap) {
        if !options.compressed {
            return;
        }
        let encoding = headers
            .get(CONTENT_ENCODING)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default();
        self.body = match (std::mem::replace(&mut self.body, Body::Ended), encoding) {
            (Body::Plain(sink), "gzip") => Body::Gzip(MultiGzDecoder::new(sink)),
            (Body::Plain(sink), "deflate") => Body::Deflate(ZlibDecoder::new(sink)),
            (body, _) => body,
        };
    }

    /// Shows a piece of the body at once.
    pub(super) fn body(&mut self, data: &[u8]) -> Result<(), Failure> {
        let result = match &mut self.body {
            Body::Plain(sink) => sink.write_all(data).and_then(|()| sink.flush()),
            Body::Gzip(decoder) => decoder.write_all(data),
            Body::Deflate(decoder) => decoder.write_all(data),
            Body::Ended => Ok(()),
        };
        result.map_err(|error| unwritten(&error))
    }

    /// Shows what a decoder still holds.
    pub(super) fn end(&mut self) -> Result<(), Failure> {
        let sink = match std::mem::replace(&mut self.body, Body::Ended) {
            Body::Plain(sink) => Ok(sink),
            Body::Gzip(decoder) => decoder.finish(),
            Body::Deflate(decoder) => decoder.finish(),
            Body::Ended => return Ok(()),
        };
        sink.and_then(|mut sink| sink.flush())
            .map_err(|error| unwritten(&error))
    }
}

/// Shows the error and `-w`; the exit code.
pub(super) fn finish(options: &Options, facts: &mut Facts, result: Result<(), Failure>) -> u8 {
    if let Err(failure) = result {
        facts.exit = failure.code;
        facts.error.clone_from(&failure.message);
        if !options.silent || options.show_error {
            eprintln!("curl: {failure}");
        }
    }
    if let Some(format) = &options.write_out {
        let text = write_out(format, facts);
        // Nobody to tell when standard output is gone.
        let _ = std::io::stdout().write_all(text.as_bytes());
    }
    facts.exit
}

/// Fills in the format of `-w`.
fn write_out(format: &str, facts: &Facts) -> String {
    let mut text = String::new();
    let mut rest = format;
    while let Some(letter) = rest.chars().next() {
        if let Some((name, after)) = rest
            .strip_prefix("%{")
            .and_then(|rest| rest.split_once('}'))
        {
            text.push_str(&variable(name, facts));
            rest = after;
            continue;
        }
        let (shown, length) = match rest.get(..2) {
            Some("%%") => ('%', 2),
            Some("\\n") => ('\n', 2),
            Some("\\r") => ('\r', 2),
            Some("\\t") => ('\t', 2),
            _ => (letter, letter.len_utf8()),
        };
        text.push(shown);
        rest = &rest[length..];
    }
    text
}

fn variable(name: &str, facts: &Facts) -> String {
    let seconds = |time: std::time::Duration| format!("{:.6}", time.as_secs_f64());
    match name {
        "http_code" | "response_code" => format!("{:03}", facts.status),
        "http_version" => if facts.version.is_empty() {
            "0"
        } else {
            facts.version
        }
        .into(),
        "method" => facts.method.clone(),
        "scheme" => facts.url.split(':').next().unwrap_or_default().into(),
        "url" | "url_effective" => facts.url.clone(),
        "redirect_url" => facts.redirect_url.clone(),
        "num_redirects" => facts.redirects.to_string(),
        "num_connects" => facts.connects.to_string(),
        "content_type" => facts.content_type.clone(),
        "remote_ip" => facts
            .remote
            .map(|address| address.ip().to_string())
            .unwrap_or_default(),
        "remote_port" => facts.remote.map_or(0, |address| address.port()).to_string(),
        "local_ip" => facts
            .local
            .map(|address| address.ip().to_string())
            .unwrap_or_default(),
        "local_port" => facts.local.map_or(0, |address| address.port()).to_string(),
        "time_namelookup" => seconds(facts.resolved),
        "time_connect" => seconds(facts.connected),
        "time_appconnect" => seconds(facts.secured),
        "time_pretransfer" => seconds(facts.connected.max(facts.secured)),
        "time_starttransfer" => seconds(facts.first_byte),
        "time_total" => seconds(facts.total),
        "size_download" => facts.downloaded.to_string(),
        "size_upload" => facts.uploaded.to_string(),
        "exitcode" => facts.exit.to_string(),
        "errormsg" => facts.error.clone(),
        unknown => format!("(unknown variable {unknown})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_filled_in() {
        let facts = Facts {
            status: 200,
            version: "1.1",
            remote: Some(([10, 0, 0, 1], 80).into()),
            total: std::time::Duration::from_millis(1500),
            ..Facts::default()
        };
        assert_eq!(
            write_out(
                "%{http_code} %{time_total} %{remote_ip} 100%% é\\n%{nope}%",
                &facts
            ),
            "200 1.500000 10.0.0.1 100% é\n(unknown variable nope)%"
        );
        assert_eq!(write_out("%{http_code}", &Facts::default()), "000");
    }
}

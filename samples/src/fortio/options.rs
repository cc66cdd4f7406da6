//! Fortio's options, in the way in which Go's `flag` package reads them.

use std::time::Duration;

use anyhow::{Context as _, bail};

/// How a load is sent.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Options {
    /// `-c`: connections, each with one request at a time. Default 4.
    pub(super) connections: usize,
    /// `-qps`: requests a second over all connections; 0 is as many as go. Default 8.
    pub(super) rate: f64,
    /// `-n`: calls in all; 0 is until the time is over.
    pub(super) calls: u64,
    /// `-t`: for how long, where `-n` is not given. Default 5 s.
    pub(super) duration: Duration,
    /// `-h2`: HTTP/2 with prior knowledge.
    pub(super) http2: bool,
    /// `-grpc`: gRPC calls; with `-ping` of Fortio's own service, else of the standard health service.
    pub(super) grpc: bool,
    /// `-ping`.
    pub(super) ping: bool,
    /// `-quiet`: `curl` prints the answer alone.
    pub(super) quiet: bool,
    /// `-timeout` of one call. Default 3 s.
    pub(super) timeout: Duration,
    /// `-H`: `Name: value`, as often as wanted.
    pub(super) headers: Vec<(String, String)>,
    /// `-payload` of a POST.
    pub(super) payload: String,
    /// `-http-port` of the server. Default 8080.
    pub(super) http_port: u16,
    /// `-grpc-port` of the server. Default 8079.
    pub(super) grpc_port: u16,
    /// The URL, or `host:port` for gRPC.
    pub(super) target: Option<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            connections: 4,
            rate: 8.0,
            calls: 0,
            duration: Duration::from_secs(5),
            http2: false,
            grpc: false,
            ping: false,
            quiet: false,
            timeout: Duration::from_secs(3),
            headers: Vec::new(),
            payload: String::new(),
            http_port: 8080,
            grpc_port: 8079,
            target: None,
        }
    }
}

impl Options {
    pub(super) fn parse(args: &[String]) -> anyhow::Result<Self> {
        let mut options = Self::default();
        let mut rest = args.iter();
        while let Some(arg) = rest.next() {
            let Some(flag) = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-')) else {
                if options.target.is_some() {
                    bail!("{arg:?} is one target too many; options come before the target");
                }
                options.target = Some(arg.clone());
                continue;
            };
            let (name, value) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            if !options.switch(name, value.as_deref())? {
                let value = match value {
                    Some(value) => value,
                    None => rest
                        .next()
                        .with_context(|| format!("the option -{name} needs a value"))?
                        .clone(),
                };
                options.set(name, &value)?;
            }
        }
        Ok(options)
    }

    /// An option without a value. True if it is one.
    fn switch(&mut self, name: &str, value: Option<&str>) -> anyhow::Result<bool> {
        let switch = match name {
            "h2" => &mut self.http2,
            "grpc" => &mut self.grpc,
            "ping" => &mut self.ping,
            "quiet" => &mut self.quiet,
            // Connections are kept alive and answers read whole in any case.
            "keepalive" | "a" | "allow-initial-errors" => {
                if value == Some("false") {
                    bail!("-{name}=false is not supported");
                }
                return Ok(true);
            }
            _ => return Ok(false),
        };
        *switch = value.is_none_or(|v| v == "true" || v == "1");
        Ok(true)
    }

    fn set(&mut self, name: &str, value: &str) -> anyhow::Result<()> {
        let wrong = || format!("-{name} {value:?} is not what this option takes");
        match name {
            "c" => {
                self.connections = value
                    .parse()
                    .ok()
                    .filter(|n| (1..=4096).contains(n))
                    .with_context(wrong)?
            }
            "qps" if value == "max" => self.rate = 0.0,
            "qps" => {
                self.rate = value
                    .parse()
                    .ok()
                    .filter(|n| *n >= 0.0)
                    .with_context(wrong)?
            }
            "n" => self.calls = value.parse().with_context(wrong)?,
            "t" => self.duration = duration(value).with_context(wrong)?,
            "timeout" => self.timeout = duration(value).with_context(wrong)?,
            "payload" => value.clone_into(&mut self.payload),
            "http-port" => self.http_port = value.parse().with_context(wrong)?,
            "grpc-port" => self.grpc_port = value.parse().with_context(wrong)?,
            "H" => {
                let (name, value) = value.split_once(':').with_context(wrong)?;
                self.headers
                    .push((name.trim().to_owned(), value.trim().to_owned()));
            }
            // There is no log beside the report, and percentiles are always the same.
            "loglevel" | "p" => {}
            other => bail!("the option -{other} is not supported"),
        }
        Ok(())
    }
}

/// Go's durations, as far as whole numbers of one unit.
fn duration(text: &str) -> Option<Duration> {
    let split = text.find(char::is_alphabetic)?;
    let (number, unit) = text.split_at(split);
    let number: f64 = number.parse().ok().filter(|n| (0.0..1e7).contains(n))?;
    let seconds = match unit {
        "ms" => number / 1000.0,
        "s" => number,
        "m" => number * 60.0,
        "h" => number * 3600.0,
        _ => return None,
    };
    Some(Duration::from_secs_f64(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> anyhow::Result<Options> {
        let args: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        Options::parse(&args)
    }

    #[test]
    fn options_are_read_as_go_reads_them() {
        let options = parse(
            "-c 3 -qps=0 --n 30 -loglevel Warning -H a:b -h2 -t 1.5s http://httpbin:8000/get",
        )
        .expect("options");
        assert_eq!(options.connections, 3);
        assert!(options.rate == 0.0 && options.http2 && !options.grpc);
        assert_eq!(options.calls, 30);
        assert_eq!(options.duration, Duration::from_millis(1500));
        assert_eq!(options.headers, [("a".to_owned(), "b".to_owned())]);
        assert_eq!(options.target.as_deref(), Some("http://httpbin:8000/get"));
    }

    #[test]
    fn what_is_unknown_is_named() {
        for (line, word) in [
            ("-unknown 1", "-unknown"),
            ("-c", "-c"),
            ("-c x", "-c \"x\""),
            ("a b", "\"b\""),
        ] {
            let error = parse(line).expect_err(line).to_string();
            assert!(error.contains(word), "{line}: {error}");
        }
    }
}

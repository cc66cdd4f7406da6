//! Container logs: one file a run in the CRI's line format (`TIME STREAM P|F TEXT`), rotated, followed without polling.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use jiff::Timestamp;
use mesh_apiserver::node::LogRequest;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::{mpsc, watch};

use super::attach::Listeners;

/// A file is put aside at this size; one generation is kept.
const MAX_BYTES: u64 = 10 << 20;
/// A longer line is written in parts, as the CRI's.
const MAX_LINE: usize = 16 << 10;
/// Bytes read from a container at a time.
const CHUNK: usize = 8 << 10;

/// The log of one run of one container.
#[derive(Debug)]
pub struct RunLog {
    path: PathBuf,
    writer: Mutex<Writer>,
    /// Counts writes; followers wait on it. Closed with the run.
    written: watch::Sender<Progress>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Progress {
    lines: u64,
    generation: u64,
    ended: bool,
}

#[derive(Debug)]
struct Writer {
    file: File,
    bytes: u64,
}

impl RunLog {
    /// Opens a new log at `path`.
    pub fn create(path: PathBuf) -> std::io::Result<Arc<Self>> {
        let file = open_new(&path)?;
        let writer = Mutex::new(Writer { file, bytes: 0 });
        Ok(Arc::new(Self {
            path,
            writer,
            written: watch::Sender::new(Progress::default()),
        }))
    }

    /// Copies a stream of the container into the log until it ends, and to whoever is attached to it.
    pub async fn copy(
        self: Arc<Self>,
        stream: &'static str,
        mut input: impl AsyncRead + Unpin,
        listeners: Listeners,
    ) {
        let mut buffer = vec![0; CHUNK];
        let mut line = Vec::new();
        while let Ok(length @ 1..) = input.read(&mut buffer).await {
            self.split(stream, &mut line, &buffer[..length]);
            listeners.tell(&buffer[..length]).await;
        }
        if !line.is_empty() {
            self.write(stream, false, &line);
        }
    }

    /// Writes the lines of `bytes` that are whole or too long; what is left stays in `line`.
    fn split(&self, stream: &str, line: &mut Vec<u8>, bytes: &[u8]) {
        for mut part in bytes.split_inclusive(|b| *b == b'\n') {
            while line.len() + part.len() > MAX_LINE {
                let (now, later) = part.split_at(MAX_LINE - line.len());
                line.extend(now);
                self.write(stream, false, line);
                line.clear();
                part = later;
            }
            line.extend(part);
            if line.pop_if(|last| *last == b'\n').is_some() {
                self.write(stream, true, line);
                line.clear();
            }
        }
    }

    fn write(&self, stream: &str, whole: bool, text: &[u8]) {
        let mut entry = format!(
            "{:.9} {stream} {} ",
            Timestamp::now(),
            if whole { 'F' } else { 'P' }
        )
        .into_bytes();
        entry.extend_from_slice(text);
        entry.push(b'\n');
        let mut writer = self
            .writer
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let rotate = writer.bytes > 0 && writer.bytes + entry.len() as u64 > MAX_BYTES;
        if rotate
            && std::fs::rename(&self.path, rotated(&self.path)).is_ok()
            && let Ok(file) = open_new(&self.path)
        {
            *writer = Writer { file, bytes: 0 };
        }
        if writer.file.write_all(&entry).is_ok() {
            writer.bytes += entry.len() as u64;
        }
        drop(writer);
        self.written.send_modify(|p| {
            p.lines += 1;
            p.generation += u64::from(rotate);
        });
    }

    /// Says that nothing more will come.
    pub fn end(&self) {
        self.written.send_modify(|p| p.ended = true);
    }

    /// The last `lines` lines, for termination messages.
    pub fn tail(&self, lines: usize) -> String {
        let request = LogRequest {
            tail_lines: Some(lines as u64),
            ..LogRequest::default()
        };
        let filter = Filter::new(&request);
        let mut out = Vec::new();
        for line in filter.select(read_lines(&self.path)) {
            out.extend(filter.render(&line));
        }
        String::from_utf8_lossy(&out).into_owned()
    }

    /// Sends what `request` asks for into `out`, on the calling task; ends with the run when following.
    pub async fn stream(self: Arc<Self>, request: LogRequest, out: mpsc::Sender<Bytes>) {
        let filter = Filter::new(&request);
        let mut left = request.limit_bytes.unwrap_or(u64::MAX);
        let mut updates = self.written.subscribe();
        let mut seen = *updates.borrow_and_update();
        let mut lines = read_lines(&rotated(&self.path));
        let Ok(mut file) = File::open(&self.path).map(BufReader::new) else {
            return;
        };
        lines.extend(take_lines(&mut file));
        for line in filter.select(lines) {
            if !send(&out, filter.render(&line), &mut left).await {
                return;
            }
        }
        while request.follow && !seen.ended {
            if updates.changed().await.is_err() {
                return;
            }
            let now = *updates.borrow_and_update();
            let mut fresh = take_lines(&mut file);
            if now.generation != seen.generation
                && let Ok(new) = File::open(&self.path)
            {
                file = BufReader::new(new);
                fresh.extend(take_lines(&mut file));
            }
            seen = now;
            for line in fresh {
                if !send(&out, filter.render(&line), &mut left).await {
                    return;
                }
            }
        }
    }
}

async fn send(out: &mpsc::Sender<Bytes>, mut text: Vec<u8>, left: &mut u64) -> bool {
    text.truncate(usize::try_from(*left).unwrap_or(usize::MAX));
    *left -= text.len() as u64;
    text.is_empty() || (out.send(Bytes::from(text)).await.is_ok() && *left > 0)
}

fn open_new(path: &Path) -> std::io::Result<File> {
    OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .open(path)
}

fn rotated(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    PathBuf::from(name)
}

fn read_lines(path: &Path) -> Vec<Vec<u8>> {
    File::open(path)
        .map(|file| take_lines(&mut BufReader::new(file)))
        .unwrap_or_default()
}

fn take_lines(file: &mut BufReader<File>) -> Vec<Vec<u8>> {
    let mut lines = Vec::new();
    loop {
        let mut line = Vec::new();
        match file.read_until(b'\n', &mut line) {
            Ok(n) if n > 0 => lines.push(line),
            _ => return lines,
        }
    }
}

struct Filter {
    since: Option<Timestamp>,
    tail: Option<usize>,
    timestamps: bool,
}

impl Filter {
    fn new(request: &LogRequest) -> Self {
        let seconds = request.since_seconds.and_then(|s| i64::try_from(s).ok());
        let ago = seconds.and_then(|s| {
            Timestamp::from_second(Timestamp::now().as_second().saturating_sub(s)).ok()
        });
        let since = request
            .since_time
            .as_deref()
            .and_then(|t| t.parse().ok())
            .or(ago);
        Self {
            since,
            tail: request
                .tail_lines
                .map(|n| usize::try_from(n).unwrap_or(usize::MAX)),
            timestamps: request.timestamps,
        }
    }

    fn select(&self, mut lines: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
        if let Some(since) = self.since {
            lines.retain(|line| {
                split(line)
                    .0
                    .parse::<Timestamp>()
                    .is_ok_and(|at| at >= since)
            });
        }
        if let Some(tail) = self.tail {
            lines.drain(..lines.len().saturating_sub(tail));
        }
        lines
    }

    fn render(&self, line: &[u8]) -> Vec<u8> {
        let (time, whole, text) = split(line);
        let mut out = if self.timestamps {
            format!("{time} ").into_bytes()
        } else {
            Vec::new()
        };
        out.extend_from_slice(text);
        if whole {
            out.push(b'\n');
        }
        out
    }
}

/// Time, whether the line is whole, text.
fn split(line: &[u8]) -> (&str, bool, &[u8]) {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    let mut parts = line.splitn(4, |b| *b == b' ');
    let time = parts
        .next()
        .and_then(|t| std::str::from_utf8(t).ok())
        .unwrap_or_default();
    let (_, tag) = (parts.next(), parts.next());
    (time, tag == Some(b"F"), parts.next().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn read(log: &Arc<RunLog>, request: LogRequest) -> String {
        let (send, mut receive) = mpsc::channel(16);
        tokio::spawn(log.clone().stream(request, send));
        let mut out = Vec::new();
        while let Some(bytes) = receive.recv().await {
            out.extend_from_slice(&bytes);
        }
        String::from_utf8(out).unwrap()
    }

    #[tokio::test]
    async fn tail_limit_timestamps_and_follow() {
        let dir = tempfile::tempdir().unwrap();
        let log = RunLog::create(dir.path().join("0.log")).unwrap();
        log.clone()
            .copy("stdout", &b"one\ntwo\nthree"[..], Listeners::default())
            .await;
        assert_eq!(read(&log, LogRequest::default()).await, "one\ntwo\nthree");
        assert_eq!(
            read(
                &log,
                LogRequest {
                    tail_lines: Some(1),
                    ..LogRequest::default()
                }
            )
            .await,
            "three"
        );
        assert_eq!(
            read(
                &log,
                LogRequest {
                    limit_bytes: Some(5),
                    ..LogRequest::default()
                }
            )
            .await,
            "one\nt"
        );
        let stamped = read(
            &log,
            LogRequest {
                timestamps: true,
                ..LogRequest::default()
            },
        )
        .await;
        assert!(
            stamped.lines().next().unwrap().ends_with("Z one"),
            "{stamped}"
        );
        let later = "2999-01-01T00:00:00Z".to_owned();
        assert_eq!(
            read(
                &log,
                LogRequest {
                    since_time: Some(later),
                    ..LogRequest::default()
                }
            )
            .await,
            ""
        );
        let following = tokio::spawn({
            let log = log.clone();
            async move {
                read(
                    &log,
                    LogRequest {
                        follow: true,
                        tail_lines: Some(0),
                        ..LogRequest::default()
                    },
                )
                .await
            }
        });
        while log.written.receiver_count() == 0 {
            tokio::task::yield_now().await;
        }
        log.clone()
            .copy("stderr", &b"four\n"[..], Listeners::default())
            .await;
        log.end();
        let followed = following.await.unwrap();
        assert!(followed.is_empty() || followed == "four\n", "{followed}");
    }

    #[tokio::test]
    async fn a_long_line_is_written_in_parts_and_read_whole() {
        let dir = tempfile::tempdir().unwrap();
        let log = RunLog::create(dir.path().join("0.log")).unwrap();
        let text = format!("{}\nend\n", "x".repeat(3 * MAX_LINE));
        log.clone()
            .copy("stdout", text.as_bytes(), Listeners::default())
            .await;
        assert_eq!(read(&log, LogRequest::default()).await, text);
        let longest = read_lines(&log.path).iter().map(Vec::len).max();
        assert!(longest < Some(MAX_LINE + 100), "{longest:?}");
    }

    #[tokio::test]
    async fn rotation_keeps_one_generation() {
        let dir = tempfile::tempdir().unwrap();
        let log = RunLog::create(dir.path().join("0.log")).unwrap();
        let line = vec![b'x'; 15_000];
        for _ in 0..800 {
            log.write("stdout", true, &line);
        }
        assert!(rotated(&log.path).exists());
        assert_eq!(log.tail(1).len(), line.len() + 1);
    }
}

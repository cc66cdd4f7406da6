//! What somebody sees who listens on the node's network: plain text without the mesh's mutual TLS, and with it TLS records alone.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd as _;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::socket::{
    AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt, socket,
};
use nix::sys::time::{TimeVal, TimeValLike as _};

use super::pods::wait_running;
use super::policy::{ask, client, httpbin, namespace};
use super::samples::with;
use crate::e2e::cluster::{Cluster, family};

/// How long a capture lasts at most, whoever forgot to end it.
const LONGEST: Duration = Duration::from_secs(60);

/// Enters the network of a process, and writes to standard output what passes all its interfaces but the loopback one: each frame behind
/// its length in four bytes, and first an empty one as a sign that it listens. It is a process of its own, as one with threads can't enter
/// the user namespace that an ordinary user's node has.
pub fn capture(pid: u32) -> anyhow::Result<()> {
    let place = |name: &str| format!("/proc/{pid}/ns/{name}");
    let same = std::fs::read_link(place("user"))? == std::fs::read_link("/proc/self/ns/user")?;
    let network = File::open(place("net")).context("opening the node's network")?;
    if !same {
        let user = File::open(place("user")).context("opening the node's user namespace")?;
        setns(&user, CloneFlags::CLONE_NEWUSER).context("entering the node's user namespace")?;
    }
    setns(&network, CloneFlags::CLONE_NEWNET).context("entering the node's network")?;
    let socket = socket(
        AddressFamily::Packet,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::EthAll,
    )
    .context("opening a packet socket")?;
    setsockopt(&socket, ReceiveTimeout, &TimeVal::milliseconds(200))?;
    let began = Instant::now();
    let mut frame = vec![0; 128 * 1024];
    let mut output = std::io::stdout().lock();
    output.write_all(&[0; 4])?;
    output.flush()?;
    while began.elapsed() < LONGEST {
        let (length, from) = match recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut frame) {
            Ok(received) => received,
            Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EINTR) => continue,
            Err(error) => return Err(error).context("reading from the packet socket"),
        };
        // The loopback interface is the first one everywhere.
        if from.is_some_and(|from| from.ifindex() == 1) {
            continue;
        }
        output.write_all(&u32::try_from(length)?.to_be_bytes())?;
        output.write_all(&frame[..length])?;
        output.flush()?;
    }
    Ok(())
}

/// A capture that runs.
struct Capture {
    child: Child,
    place: tempfile::TempDir,
}

impl Capture {
    /// Returns when it listens.
    fn start(cluster: &Cluster) -> anyhow::Result<Self> {
        let has_bridge = |pid: &u32| {
            std::fs::read_to_string(format!("/proc/{pid}/net/dev"))
                .is_ok_and(|text| text.contains("cni0"))
        };
        let node = family(cluster.pid()?)
            .into_iter()
            .find(has_bridge)
            .context("no process of the cluster is in a network with the bridge cni0")?;
        let place = tempfile::Builder::new().prefix("mesh-wire-").tempdir()?;
        let child = Command::new(std::env::current_exe()?)
            .args(["e2e", "--capture", &node.to_string()])
            .stdin(Stdio::null())
            .stdout(File::create(place.path().join("frames"))?)
            .spawn()
            .context("starting the capture")?;
        let mut capture = Self { child, place };
        let began = Instant::now();
        while capture.written()?.is_empty() {
            if let Some(status) = capture.child.try_wait()? {
                bail!("the capture ended with {status}");
            }
            ensure!(
                began.elapsed() < Duration::from_secs(10),
                "the capture does not begin"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(capture)
    }

    fn written(&self) -> anyhow::Result<Vec<u8>> {
        Ok(std::fs::read(self.place.path().join("frames"))?)
    }

    /// Ends it and gives the frames.
    fn stop(mut self) -> anyhow::Result<Vec<Vec<u8>>> {
        // What was sent before an answer came has passed the bridge, but its reader may be behind.
        std::thread::sleep(Duration::from_millis(300));
        if let Some(status) = self.child.try_wait()? {
            bail!("the capture ended with {status} before it was to");
        }
        self.child.kill()?;
        self.child.wait()?;
        let written = self.written()?;
        let mut frames = Vec::new();
        let mut rest = written.as_slice();
        // The last frame may be half written.
        while let Some((length, more)) = rest.split_first_chunk::<4>() {
            let Some((frame, more)) = more.split_at_checked(u32::from_be_bytes(*length) as usize)
            else {
                break;
            };
            frames.push(frame.to_vec());
            rest = more;
        }
        Ok(frames)
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        // Nothing where it was stopped.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One TCP segment over IPv4 in an Ethernet frame.
struct Segment<'f> {
    from: (Ipv4Addr, u16),
    to: (Ipv4Addr, u16),
    sequence: u32,
    payload: &'f [u8],
}

/// `None` for everything else.
fn segment(frame: &[u8]) -> Option<Segment<'_>> {
    let packet = frame.get(14..)?;
    let version = *packet.first()?;
    if frame[12..14] != [8, 0] || version >> 4 != 4 || *packet.get(9)? != 6 {
        return None;
    }
    let address = |at: usize| {
        let bytes: [u8; 4] = packet.get(at..at + 4)?.try_into().ok()?;
        Some(Ipv4Addr::from(bytes))
    };
    let length = usize::from(u16::from_be_bytes([packet[2], packet[3]]));
    let packet_end = packet.get(..length).unwrap_or(packet);
    let tcp = packet_end.get(usize::from(version & 15) * 4..)?;
    let number = |at: usize| Some(u16::from_be_bytes([*tcp.get(at)?, *tcp.get(at + 1)?]));
    let sequence: [u8; 4] = tcp.get(4..8)?.try_into().ok()?;
    Some(Segment {
        from: (address(12)?, number(0)?),
        to: (address(16)?, number(2)?),
        sequence: u32::from_be_bytes(sequence),
        payload: tcp.get(usize::from(*tcp.get(12)? >> 4) * 4..)?,
    })
}

type Place = (Ipv4Addr, u16);

/// The first sequence number that was seen, and the payloads by how far behind it they are.
type Flow<'f> = (u32, BTreeMap<u32, &'f [u8]>);

/// The bytes between two pods, put together again, by direction.
fn streams(
    frames: &[Vec<u8>],
    one: Ipv4Addr,
    other: Ipv4Addr,
) -> BTreeMap<(Place, Place), Vec<u8>> {
    let mut pieces: BTreeMap<(Place, Place), Flow<'_>> = BTreeMap::new();
    for frame in frames {
        let Some(segment) = segment(frame) else {
            continue;
        };
        let ends = [segment.from.0, segment.to.0];
        let between = ends == [one, other] || ends == [other, one];
        if !between || segment.payload.is_empty() {
            continue;
        }
        let (first, flow) = pieces
            .entry((segment.from, segment.to))
            .or_insert((segment.sequence, BTreeMap::new()));
        // Each frame is seen where it comes in and where it goes out.
        flow.insert(segment.sequence.wrapping_sub(*first), segment.payload);
    }
    let joined = |flow: BTreeMap<u32, &[u8]>| {
        let mut bytes: Vec<u8> = Vec::new();
        for (at, payload) in flow {
            if at as usize == bytes.len() {
                bytes.extend_from_slice(payload);
            }
        }
        bytes
    };
    pieces
        .into_iter()
        .map(|(ends, (_, flow))| (ends, joined(flow)))
        .collect()
}

/// Whole TLS records and nothing else (RFC 8446, section 5.1); gives how many.
fn records(mut bytes: &[u8]) -> anyhow::Result<usize> {
    let mut count = 0;
    while !bytes.is_empty() {
        let [kind, 3, 1 | 3, high, low, rest @ ..] = bytes else {
            bail!("not a TLS record: {:?}", String::from_utf8_lossy(bytes));
        };
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        ensure!(
            (20..=23).contains(kind) && length <= rest.len() && length <= (1 << 14) + 256,
            "not a TLS record: kind {kind}, {length} bytes of {}",
            rest.len()
        );
        bytes = &rest[length..];
        count += 1;
    }
    Ok(count)
}

const PLAIN: &str = "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: plain, namespace: wire}
spec: {mtls: {mode: DISABLE}}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: plain, namespace: wire}
spec:
  host: httpbin.wire.svc.cluster.local
  trafficPolicy: {tls: {mode: DISABLE}}
";

/// Sends a text there and back, and gives what passed meanwhile.
fn overheard(cluster: &Cluster, text: &str) -> anyhow::Result<Vec<Vec<u8>>> {
    let capture = Capture::start(cluster)?;
    let args = format!("-H 'x-secret: {text}' 'http://httpbin:8000/anything/{text}'");
    let (status, body) = ask(cluster, ("client", "wire"), &args)?;
    ensure!(
        status == "200" && body.matches(text).count() > 1,
        "the text does not come back: {status}: {body}"
    );
    capture.stop()
}

fn contains(frames: &[Vec<u8>], text: &str) -> bool {
    let has = |frame: &Vec<u8>| {
        frame
            .windows(text.len())
            .any(|part| part == text.as_bytes())
    };
    frames.iter().any(has)
}

fn address(cluster: &Cluster, pod: &str) -> anyhow::Result<Ipv4Addr> {
    let pod = cluster.get(&["pod", pod, "-n", "wire"])?;
    let address = pod["status"]["podIP"].as_str().context("no address")?;
    address.parse().context("reading a pod's address")
}

/// With mutual TLS switched off a text is read on the node's network; as the mesh is by itself, there are TLS records alone.
pub(super) fn overhears(cluster: &mut Cluster) -> anyhow::Result<()> {
    let texts = [
        namespace("wire"),
        client("wire", "client", true),
        httpbin("wire"),
        PLAIN.to_owned(),
    ];
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    with(cluster, &texts, |cluster| {
        for pod in ["client", "httpbin"] {
            wait_running(cluster, "wire", pod)?;
        }
        let ends = (address(cluster, "client")?, address(cluster, "httpbin")?);
        let mut round = 0;
        let mut next = || {
            round += 1;
            format!("read-by-everybody-{round}-times")
        };
        cluster.wait("a text to be read on the node's network", || {
            let text = next();
            let frames = overheard(cluster, &text)?;
            Ok(contains(&frames, &text).then_some(()))
        })?;
        cluster.delete_all(PLAIN)?;
        cluster.wait("nothing to be read any more", || {
            let text = next();
            let frames = overheard(cluster, &text)?;
            Ok((!contains(&frames, &text)).then_some(()))
        })?;
        for _ in 0..3 {
            only_tls(cluster, ends, &next())?;
        }
        Ok(())
    })
}

/// The text is nowhere, and between the two pods there are whole TLS records, at least as long as the text, in both directions.
fn only_tls(
    cluster: &Cluster,
    (client, server): (Ipv4Addr, Ipv4Addr),
    text: &str,
) -> anyhow::Result<()> {
    let frames = overheard(cluster, text)?;
    ensure!(
        !contains(&frames, text),
        "{text:?} is read on the node's network"
    );
    let streams = streams(&frames, client, server);
    for from in [client, server] {
        let mut bytes = 0;
        for (ends, stream) in streams.iter().filter(|(ends, _)| ends.0.0 == from) {
            records(stream).with_context(|| format!("from {:?} to {:?}", ends.0, ends.1))?;
            bytes += stream.len();
        }
        ensure!(
            bytes > text.len(),
            "{bytes} bytes were seen from {from}, in {} frames",
            frames.len()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An Ethernet frame with a TCP segment of this sequence number and payload, and padding behind it.
    fn frame(sequence: u32, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend([8, 0, 0x45, 0, 0, 0, 0, 0, 0, 0, 64, 6, 0, 0]);
        frame.extend([10, 0, 0, 1, 10, 0, 0, 2, 0x12, 0x34, 0x1f, 0x90]);
        frame.extend(sequence.to_be_bytes());
        frame.extend([0, 0, 0, 0, 0x50, 0x18, 0, 0, 0, 0, 0, 0]);
        frame.extend(payload);
        let length = u16::try_from(frame.len() - 14).unwrap();
        frame[16..18].copy_from_slice(&length.to_be_bytes());
        frame.extend([0xee; 3]);
        frame
    }

    #[test]
    fn what_is_seen_twice_and_around_the_end_of_the_numbers_is_one_stream_of_records() {
        let one = frame(u32::MAX, &[23, 3, 3]);
        let frames = [one.clone(), one, frame(2, &[0, 2, 7]), frame(5, &[7])];
        let (from, to) = (Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2));
        let streams = streams(&frames, to, from);
        let stream = &streams[&((from, 0x1234), (to, 8080))];
        assert_eq!(stream, &[23, 3, 3, 0, 2, 7, 7]);
        assert_eq!(records(stream).unwrap(), 1);
    }

    #[test]
    fn plain_text_and_half_a_record_are_no_records() {
        for bytes in [
            b"GET / HTTP/1.1".as_slice(),
            &[23, 3, 3, 0, 2, 7],
            &[24, 3, 3, 0, 0],
        ] {
            assert!(records(bytes).is_err(), "{bytes:?}");
        }
    }
}

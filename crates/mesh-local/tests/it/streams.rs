//! Standard input, terminals and attached clients.

use std::path::Path;
use std::pin::Pin;
use std::time::Duration;

use mesh_apiserver::node::{ExecRequest, ExecSession, ExitStatus, NodeBackend, TerminalSize};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};

use crate::api::Api;
use crate::pods::{Running, ready, start};

pub async fn all(run: &Path) {
    input_that_ends_with_its_first_client(run).await;
    input_that_stays_open(run).await;
    a_container_with_a_terminal(run).await;
}

/// A client's side of a session.
struct Client {
    session: ExecSession,
    out: Pin<Box<dyn AsyncRead + Send>>,
    seen: String,
}

impl Client {
    async fn connect(pod: &Running, request: ExecRequest) -> Self {
        let request = ExecRequest {
            namespace: "shop".into(),
            pod: "p".into(),
            container: "app".into(),
            stdin: true,
            stdout: true,
            ..request
        };
        let mut session = pod.backend.exec(request).await.unwrap();
        let out = session.stdout.take().unwrap();
        Self {
            session,
            out,
            seen: String::new(),
        }
    }

    async fn attach(pod: &Running, tty: bool) -> Self {
        let request = ExecRequest {
            attach: true,
            tty,
            ..ExecRequest::default()
        };
        Self::connect(pod, request).await
    }

    async fn send(&mut self, text: &str) {
        let stdin = self.session.stdin.as_mut().unwrap();
        stdin.write_all(text.as_bytes()).await.unwrap();
        stdin.flush().await.unwrap();
    }

    async fn resize(&self, width: u16, height: u16) {
        let size = TerminalSize { width, height };
        self.session.resize.send(size).await.unwrap();
    }

    /// Reads until `wanted` was seen.
    async fn expect(&mut self, wanted: &str) {
        let reading = self.see(wanted);
        let result = tokio::time::timeout(Duration::from_secs(20), reading).await;
        assert!(result.is_ok(), "{wanted:?} is not in {:?}", self.seen);
    }

    async fn see(&mut self, wanted: &str) {
        let mut buffer = [0; 1024];
        while !self.seen.contains(wanted) {
            match self.out.read(&mut buffer).await.unwrap() {
                0 => panic!("{wanted:?} was not in {:?}", self.seen),
                n => self.seen += std::str::from_utf8(&buffer[..n]).unwrap(),
            }
        }
    }

    /// Presses a key until `wanted` was seen: a shell loses a signal that comes just before it begins to wait.
    async fn press_until(&mut self, key: &str, wanted: &str) {
        for _ in 0..40 {
            self.send(key).await;
            let reading = self.see(wanted);
            if tokio::time::timeout(Duration::from_millis(500), reading)
                .await
                .is_ok()
            {
                return;
            }
        }
        panic!("{wanted:?} is not in {:?}", self.seen);
    }

    /// Closes the input and reads to the end.
    async fn finish(mut self) -> (String, ExitStatus) {
        if let Some(mut stdin) = self.session.stdin.take() {
            stdin.shutdown().await.unwrap();
        }
        self.out.read_to_string(&mut self.seen).await.unwrap();
        (self.seen, self.session.exit.await)
    }
}

fn spec(script: &str, more: Value) -> Value {
    let mut container =
        json!({"name": "app", "image": "x", "command": ["/bin/sh", "-c", script], "stdin": true});
    for (name, value) in more.as_object().unwrap() {
        container[name] = value.clone();
    }
    json!({"restartPolicy": "Never", "containers": [container]})
}

const READER: &str = "while read line; do echo \"got $line\"; done; echo end; echo bad >&2";

async fn input_that_ends_with_its_first_client(run: &Path) {
    let pod = start(run, Api::new(), spec(READER, json!({"stdinOnce": true})));
    pod.api.wait("the pod to be ready", ready).await;
    let mut client = Client::attach(&pod, false).await;
    client.send("one\n").await;
    client.expect("got one\n").await;
    let (seen, exit) = client.finish().await;
    assert_eq!(
        (seen.as_str(), exit),
        ("got one\nend\n", ExitStatus::Code(0)),
        "what was written after the input's end is delivered, standard error apart"
    );
    pod.api.wait("the end", |s| s["phase"] == "Succeeded").await;
    // The order of two streams is not known.
    let log = pod.logs("app", false).await;
    assert_eq!(log.replace("bad\n", ""), "got one\nend\n");
    assert!(log.contains("bad\n"), "{log}");
    pod.delete().await;
}

async fn input_that_stays_open(run: &Path) {
    let pod = start(run, Api::new(), spec(READER, json!({})));
    pod.api.wait("the pod to be ready", ready).await;
    for line in ["one", "two"] {
        let mut client = Client::attach(&pod, false).await;
        client.send(&format!("{line}\n")).await;
        client.expect(&format!("got {line}\n")).await;
        let (seen, exit) = client.finish().await;
        assert_eq!((seen, exit), (format!("got {line}\n"), ExitStatus::Code(0)));
    }
    assert_eq!(pod.logs("app", false).await, "got one\ngot two\n");
    pod.delete().await;
}

/// Whether the shell's terminal has a name, the size the client says, and Ctrl-C.
async fn shell_in_a_terminal(client: &mut Client) {
    client
        .send("tty; echo $TERM; echo by name > $(tty)\n")
        .await;
    client.expect("/dev/pts/").await;
    client.expect("xterm\r\n").await;
    client.expect("by name\r\n").await;
    client.resize(123, 45).await;
    // The size travels beside the input.
    client
        .send("until test \"$(stty size)\" = '45 123'; do sleep 0.05; done; echo as wide\n")
        .await;
    client.expect("as wide\r\n").await;
    client
        .send("(trap 'echo stopped; exit' INT; echo begun; read line)\n")
        .await;
    client.expect("begun\r\n").await;
    client.press_until("\x03", "stopped\r\n").await;
}

async fn a_container_with_a_terminal(run: &Path) {
    let mut spec = spec("", json!({"tty": true}));
    spec["containers"][0]["command"] = json!(["/bin/sh", "-i"]);
    let pod = start(run, Api::new(), spec);
    pod.api.wait("the pod to be ready", ready).await;
    let mut client = Client::attach(&pod, true).await;
    shell_in_a_terminal(&mut client).await;
    drop(client);
    let command = ["/bin/sh", "-i"].map(str::to_owned).into();
    let request = ExecRequest {
        command,
        tty: true,
        ..ExecRequest::default()
    };
    let mut client = Client::connect(&pod, request).await;
    shell_in_a_terminal(&mut client).await;
    client.send("exit 5\n").await;
    assert_eq!(client.finish().await.1, ExitStatus::Code(5));
    // The container's own shell was not disturbed, and ends as its user says.
    let mut client = Client::attach(&pod, true).await;
    client.send("exit 0\n").await;
    pod.api.wait("the end", |s| s["phase"] == "Succeeded").await;
    assert!(pod.logs("app", false).await.contains("as wide\r\n"));
    pod.delete().await;
}

use mesh_samples::{helloworld, web};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use crate::{get, start};

#[tokio::test]
async fn helloworld_names_version_and_instance() {
    let address = start(helloworld::router("v2", "pod-1")).await;
    assert_eq!(
        get(address, "/hello", &[]).await.1,
        "Hello version: v2, instance: pod-1\n"
    );
    assert_eq!(
        get(address, "/health", &[]).await.1,
        "Helloworld is healthy"
    );
}

#[tokio::test]
async fn web_servers_can_be_told_apart() {
    for flavour in ["httpd", "tomcat", "nginx"] {
        let page = get(start(web::router(flavour)).await, "/", &[]).await.1;
        assert!(page.contains(&format!("comes from {flavour}")), "{page}");
    }
}

#[tokio::test]
async fn tcp_echo_puts_its_word_before_every_line() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(mesh_samples::tcp_echo::serve_on(listener, "one".into()));
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(b"hello\nworld\n").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert_eq!(answer, "one hello\none world\n");
}

#[test]
fn unknown_samples_and_bad_settings_say_what_is_wrong() {
    let message = |name: &str, args: &[&str]| {
        let args: Vec<_> = args.iter().map(|arg| (*arg).to_owned()).collect();
        format!("{:#}", mesh_samples::run(name, &args).unwrap_err())
    };
    assert!(
        message("nonsense", &[]).contains("productpage"),
        "the known ones are listed"
    );
    assert!(message("web", &["iis"]).contains("httpd, tomcat, nginx"));
    assert!(message("tcp-echo", &[]).contains("9000"));
    assert!(message("details", &["--port", "x"]).contains("'x'"));
    let taken = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    assert!(message("details", &["--port", &port]).contains(&port));
}

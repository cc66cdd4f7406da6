use std::collections::BTreeMap;
use std::io::Read;
use std::path::PathBuf;
use std::process::Command;

use flate2::read::GzDecoder;
use serde_json::{Value, json};

use super::{Args, Name, architecture, image, run};

/// A program that needs nothing of the system: what it was called by, and whom it runs as. It has a chart, too.
const PROGRAM: &str = r#"
fn main() {
    let all: Vec<String> = std::env::args().collect();
    if let [_, manifest, chart, _, folder] = &all[..] && manifest == "manifest" && chart == "chart" {
        std::fs::create_dir_all(format!("{folder}/templates")).unwrap();
        std::fs::write(format!("{folder}/Chart.yaml"), "name: mesh\nversion: 9.8.7\n").unwrap();
        std::fs::write(format!("{folder}/templates/a.yaml"), "a: 1\n").unwrap();
        return;
    }
    let mut args = std::env::args();
    println!("{:?} {:?}", args.next(), args.collect::<Vec<_>>());
    println!("{}", std::fs::read_to_string("/etc/passwd").map_or(0, |text| text.lines().count()));
}
"#;

/// A binary of it, linked statically or not.
fn program(folder: &std::path::Path, statically: bool) -> PathBuf {
    let (source, binary) = (
        folder.join("program.rs"),
        folder.join(format!("program-{statically}")),
    );
    std::fs::write(&source, PROGRAM).unwrap();
    let feature = format!(
        "target-feature={}crt-static",
        if statically { '+' } else { '-' }
    );
    let status = Command::new("rustc")
        .args([
            "--edition",
            "2024",
            "-C",
            "strip=symbols",
            "-C",
            &feature,
            "-o",
        ])
        .args([&binary, &source])
        .status()
        .expect("rustc is needed");
    assert!(status.success());
    binary
}

/// Type, mode, owner, target of a link, content.
type Found = (u8, u32, u32, String, Vec<u8>);

/// Reads an archive, by path.
fn entries(archive: &[u8]) -> BTreeMap<String, Found> {
    let mut found = BTreeMap::new();
    let mut at = 0;
    while archive[at..at + 512].iter().any(|byte| *byte != 0) {
        let block = &archive[at..at + 512];
        let text = |from: usize, length: usize| {
            let field = &block[from..from + length];
            let end = field.iter().position(|byte| *byte == 0).unwrap_or(length);
            String::from_utf8(field[..end].to_vec()).unwrap()
        };
        let number = |from, length| u32::from_str_radix(text(from, length).trim(), 8).unwrap();
        let sum: u32 = block
            .iter()
            .enumerate()
            .map(|(i, byte)| {
                if (148..156).contains(&i) {
                    32
                } else {
                    u32::from(*byte)
                }
            })
            .sum();
        assert_eq!(number(148, 8), sum);
        assert_eq!((&block[257..263], number(136, 12)), (&b"ustar\0"[..], 0));
        let size = number(124, 12) as usize;
        let content = archive[at + 512..at + 512 + size].to_vec();
        let before = found.insert(
            text(0, 100),
            (
                block[156],
                number(100, 8),
                number(108, 8),
                text(157, 100),
                content,
            ),
        );
        assert!(before.is_none(), "{} is there twice", text(0, 100));
        at += 512 + size.next_multiple_of(512);
    }
    assert_eq!(archive.len(), at + 1024);
    found
}

fn pack(binary: &std::path::Path, output: &std::path::Path) -> Vec<u8> {
    run(&Args {
        binary: Some(binary.to_owned()),
        target: None,
        image: "mesh".to_owned(),
        tag: "1.2.3".to_owned(),
        output: Some(output.to_owned()),
        any_size: false,
    })
    .unwrap();
    std::fs::read(output).unwrap()
}

#[test]
fn the_archive_is_a_layout_and_a_docker_archive_of_one_image_that_runs() {
    let folder = tempfile::tempdir().unwrap();
    let binary = program(folder.path(), true);
    let archive = pack(&binary, &folder.path().join("a/mesh.tar"));
    let files = entries(&archive);
    let json = |path: &str| -> Value { serde_json::from_slice(&files[path].4).unwrap() };
    assert_eq!(json("oci-layout"), json!({ "imageLayoutVersion": "1.0.0" }));
    // Each blob is what its name says, and each descriptor is right about its blob.
    let described = |descriptor: &Value| {
        let digest = descriptor["digest"].as_str().unwrap();
        let path = digest.replace("sha256:", "blobs/sha256/");
        assert_eq!(descriptor["size"], files[&path].4.len());
        let sum = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &files[&path].4);
        let hex: String = sum
            .as_ref()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert!(path.ends_with(&hex));
        path
    };
    let index = json("index.json");
    let entry = &index["manifests"][0];
    assert_eq!(
        entry["mediaType"],
        "application/vnd.oci.image.manifest.v1+json"
    );
    assert_eq!(
        entry["annotations"],
        json!({ "io.containerd.image.name": "docker.io/library/mesh:1.2.3", "org.opencontainers.image.ref.name": "1.2.3" })
    );
    let manifest = json(&described(entry));
    assert_eq!(
        (
            &manifest["schemaVersion"],
            manifest["layers"].as_array().unwrap().len()
        ),
        (&json!(2), 1)
    );
    assert_eq!(
        manifest["layers"][0]["mediaType"],
        "application/vnd.oci.image.layer.v1.tar+gzip"
    );
    let (config, layer) = (
        described(&manifest["config"]),
        described(&manifest["layers"][0]),
    );
    let docker = json("manifest.json");
    assert_eq!(
        docker,
        json!([{ "Config": config, "RepoTags": ["mesh:1.2.3"], "Layers": [layer] }])
    );
    let mut plain = Vec::new();
    GzDecoder::new(files[&layer].4.as_slice())
        .read_to_end(&mut plain)
        .unwrap();
    // Magic, method, no flags, no time.
    assert_eq!(files[&layer].4[..8], [0x1f, 0x8b, 8, 0, 0, 0, 0, 0]);
    let sum = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &plain);
    let hex: String = sum
        .as_ref()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let config = json(&config);
    assert_eq!(
        config["rootfs"],
        json!({ "type": "layers", "diff_ids": [format!("sha256:{hex}")] })
    );
    assert_eq!(
        (&config["os"], &config["architecture"]),
        (&json!("linux"), &entry["platform"]["architecture"])
    );
    let inside = &config["config"];
    assert_eq!(
        (&inside["User"], &inside["Entrypoint"]),
        (&json!("1337"), &json!(["/usr/local/bin/mesh"]))
    );
    layer_is_right_and_runs(&plain, folder.path());
}

fn layer_is_right_and_runs(plain: &[u8], folder: &std::path::Path) {
    let inside = entries(plain);
    let mode = |path: &str| (inside[path].0, inside[path].1, inside[path].2);
    assert_eq!(mode("usr/local/bin/mesh"), (b'0', 0o755, 0));
    assert_eq!(mode("tmp/"), (b'5', 0o1777, 0));
    assert_eq!(mode("var/lib/istio/data/"), (b'5', 0o755, 1337));
    assert_eq!(inside["usr/local/bin/curl"].3, "mesh");
    let authorities =
        String::from_utf8(inside["etc/ssl/certs/ca-certificates.crt"].4.clone()).unwrap();
    assert!(authorities.matches("BEGIN CERTIFICATE").count() > 50);
    let users = String::from_utf8_lossy(&inside["etc/passwd"].4);
    assert!(users.contains("istio-proxy:x:1337:1337:"), "{users}");
    // Every folder comes before what is in it.
    let tar = folder.join("layer.tar");
    std::fs::write(&tar, plain).unwrap();
    let root = folder.join("root");
    std::fs::create_dir(&root).unwrap();
    let unpacked = Command::new("tar")
        .args(["--no-same-owner", "-x", "-f"])
        .args([&tar, std::path::Path::new("-C"), &root])
        .status()
        .expect("tar is needed");
    assert!(unpacked.success());
    let links = image::APPLETS
        .iter()
        .map(|name| format!("/usr/local/bin/{name}"));
    let programs = ["/usr/local/bin/mesh", "/bin/sleep"].map(str::to_owned);
    for name in programs.into_iter().chain(links) {
        // In a user namespace, so that an ordinary user may change the root, too.
        let output = Command::new("unshare")
            .args(["--map-root-user", "--root"])
            .args([root.as_os_str(), name.as_ref(), "version".as_ref()])
            .output()
            .expect("unshare (util-linux) is needed");
        let text = String::from_utf8_lossy(&output.stdout);
        let expected = format!("Some({name:?}) [\"version\"]\n3\n");
        assert_eq!(
            text,
            expected,
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

#[test]
fn a_binary_that_can_not_run_in_the_image_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let binary = std::fs::read(program(folder.path(), false)).unwrap();
    let error = architecture(&binary).unwrap_err().to_string();
    assert!(error.contains("linked dynamically"), "{error}");
    for wrong in [&b""[..], b"#!/bin/sh\n", &binary[..40], &binary[..64]] {
        assert!(architecture(wrong).is_err());
    }
}

#[test]
fn the_same_binary_makes_the_same_archive() {
    let archive = || {
        let name = Name::new("mesh", "1").unwrap();
        image::archive(&image::layer(b"binary").unwrap(), "amd64", &name).unwrap()
    };
    assert_eq!(archive(), archive());
}

/// Where the chart of the packed binary lies, what is in it, and the checksums of both.
#[test]
fn the_chart_lies_beside_it() {
    let folder = tempfile::tempdir().unwrap();
    let binary = program(folder.path(), true);
    let dist = folder.path().join("dist");
    pack(&binary, &dist.join("image.tar"));
    let first = std::fs::read(dist.join("mesh-9.8.7.tgz")).unwrap();
    let mut plain = Vec::new();
    GzDecoder::new(&first[..]).read_to_end(&mut plain).unwrap();
    let found = entries(&plain);
    let names: Vec<&str> = found.keys().map(String::as_str).collect();
    assert_eq!(names, ["mesh/Chart.yaml", "mesh/templates/a.yaml"]);
    assert_eq!(found["mesh/templates/a.yaml"].4, b"a: 1\n");
    for name in ["image.tar", "mesh-9.8.7.tgz"] {
        let sums = Command::new("sha256sum")
            .args(["--check", &format!("{name}.sha256")])
            .current_dir(&dist)
            .output()
            .expect("sha256sum is needed");
        assert!(sums.status.success(), "{sums:?}");
    }
    pack(&binary, &dist.join("image.tar"));
    assert_eq!(std::fs::read(dist.join("mesh-9.8.7.tgz")).unwrap(), first);
}

#[test]
fn names_are_completed_as_docker_does_it() {
    for (image, full, short) in [
        ("mesh", "docker.io/library/mesh:1", "mesh:1"),
        ("team/mesh", "docker.io/team/mesh:1", "team/mesh:1"),
        ("localhost/mesh", "localhost/mesh:1", "localhost/mesh:1"),
        (
            "registry.example:5000/a/mesh",
            "registry.example:5000/a/mesh:1",
            "registry.example:5000/a/mesh:1",
        ),
    ] {
        let name = Name::new(image, "1").unwrap();
        assert_eq!((name.full().as_str(), name.short().as_str()), (full, short));
    }
    for (image, tag) in [
        ("mesh", "latest"),
        ("mesh", ""),
        ("mesh", "a b"),
        ("Mesh", "1"),
        ("", "1"),
        ("a//b", "1"),
    ] {
        assert!(Name::new(image, tag).is_err(), "{image}:{tag}");
    }
}

#[test]
fn every_applet_of_the_samples_is_linked() {
    let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../samples/src/images.rs");
    let text = std::fs::read_to_string(file).unwrap();
    let lists = text
        .split("applets: &[")
        .skip(1)
        .chain(text.split("_APPLETS: &[&str] = &[").skip(1));
    let mut count = 0;
    for list in lists {
        let list = &list[..list.find(']').unwrap()];
        for name in list.split(',').map(|name| name.trim().trim_matches('"')) {
            assert!(
                name.is_empty() || image::APPLETS.contains(&name) || name.starts_with("&'static"),
                "{name}"
            );
            count += 1;
        }
    }
    assert!(count > 6);
}

//! Makes the descriptor set for the JSON form of Envoy's messages from the .proto files that lie in the `envoy-types` package.
//! Nothing of it is kept in our tree, and no `protoc` is needed.

use std::env;
use std::error::Error;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use protox::file::{ChainFileResolver, File, FileResolver, GoogleFileResolver};

/// Import roots below the package's `proto` folder.
const ROOTS: [&str; 8] = [
    "data-plane-api",
    "xds",
    "googleapis",
    "protoc-gen-validate",
    "cel-spec/proto",
    "client_model",
    "opentelemetry-proto",
    "ratelimit/api",
];
/// Messages that the package lacks, written here from their public field numbers.
const OWN: [(&str, &str); 2] = [
    ("udpa/type/v1/typed_struct.proto", TYPED_STRUCT_UDPA),
    ("xds/type/v3/typed_struct.proto", TYPED_STRUCT_XDS),
];
const TYPED_STRUCT_UDPA: &str = r#"syntax = "proto3";
package udpa.type.v1;
import "google/protobuf/struct.proto";
message TypedStruct { string type_url = 1; google.protobuf.Struct value = 2; }
"#;
const TYPED_STRUCT_XDS: &str = r#"syntax = "proto3";
package xds.type.v3;
import "google/protobuf/struct.proto";
message TypedStruct { string type_url = 1; google.protobuf.Struct value = 2; }
"#;
fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    let package = package_dir("envoy-types")?;
    println!(
        "cargo::rerun-if-changed={}",
        package.join("Cargo.toml").display()
    );
    let proto = package.join("proto");
    let mut names: Vec<String> = OWN.iter().map(|(name, _)| (*name).to_owned()).collect();
    collect(
        &proto.join("data-plane-api"),
        &proto.join("data-plane-api"),
        &mut names,
    )?;
    names.sort();
    let mut resolver = ChainFileResolver::new();
    resolver.add(EnvoyFiles { proto });
    resolver.add(GoogleFileResolver::new());
    let mut compiler = protox::Compiler::with_file_resolver(resolver);
    compiler.include_imports(true).open_files(&names)?;
    let set = compiler.encode_file_descriptor_set();
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
    packed.write_all(&set)?;
    fs::write(out.join("descriptors.bin.gz"), packed.finish()?)?;
    Ok(())
}

/// The names (paths below `root`) of all .proto files in `dir`.
fn collect(root: &Path, dir: &Path, names: &mut Vec<String>) -> Result<(), Box<dyn Error>> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(root, &path, names)?;
        } else if path
            .extension()
            .is_some_and(|extension| extension == "proto")
        {
            let name = path
                .strip_prefix(root)?
                .to_str()
                .ok_or("a path that is not UTF-8")?;
            names.push(name.to_owned());
        }
    }
    Ok(())
}

/// The package's files, with the names that Envoy writes relative to its own package made absolute: compiled all together,
/// `config.core.v3.HttpUri` in a file of `envoy.extensions` would be looked for in `envoy.extensions.config`.
struct EnvoyFiles {
    proto: PathBuf,
}

impl FileResolver for EnvoyFiles {
    fn open_file(&self, name: &str) -> Result<File, protox::Error> {
        if let Some((_, source)) = OWN.iter().find(|(own, _)| *own == name) {
            return File::from_source(name, source);
        }
        for root in ROOTS {
            if let Ok(source) = fs::read_to_string(self.proto.join(root).join(name)) {
                let source = if name.starts_with("envoy/") {
                    absolute(&source)
                } else {
                    source
                };
                return File::from_source(name, &source);
            }
        }
        Err(protox::Error::file_not_found(name))
    }
}

fn absolute(source: &str) -> String {
    let lines = || source.lines().map(str::trim_start);
    let package = lines()
        .find_map(|line| line.strip_prefix("package ")?.strip_suffix(';'))
        .unwrap_or_default();
    let imported: Vec<String> = lines()
        .filter_map(|line| line.strip_prefix("import \"")?.strip_suffix("\";"))
        .filter_map(|file| Some(file.rsplit_once('/')?.0.replace('/', ".")))
        .collect();
    let mut result = String::with_capacity(source.len());
    for code in lines().map(|line| if line.starts_with("//") { "" } else { line }) {
        let mut name = code;
        for label in ["repeated ", "optional ", "map<string, "] {
            name = name.strip_prefix(label).unwrap_or(name);
        }
        result.push_str(&code[..code.len() - name.len()]);
        if let Some(scope) = scope_of(name, package, &imported) {
            result.push_str(&scope);
        }
        result.push_str(name);
        result.push('\n');
    }
    result
}

/// For a line that begins with a relative type name: the package, with dots, in which the imports have it.
fn scope_of(line: &str, package: &str, imported: &[String]) -> Option<String> {
    let name = line
        .split(|c: char| !(c.is_alphanumeric() || c == '_' || c == '.'))
        .next()?;
    let message = name
        .split('.')
        .position(|part| part.starts_with(char::is_uppercase))?;
    let relative = name.split('.').take(message).collect::<Vec<_>>().join(".");
    if relative.is_empty() {
        return None;
    }
    let mut scope = package;
    loop {
        if imported
            .iter()
            .any(|package| *package == format!("{scope}.{relative}"))
        {
            return Some(format!(".{scope}."));
        }
        scope = scope.rsplit_once('.')?.0;
    }
}

/// Where the sources of a dependency lie. The registry's folder is looked at first, as asking cargo takes longer and may want
/// packages that this build does not need.
fn package_dir(name: &str) -> Result<PathBuf, Box<dyn Error>> {
    let manifest_dir =
        PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").ok_or("no CARGO_MANIFEST_DIR")?);
    if let Some(found) = in_registry(&manifest_dir, name) {
        return Ok(found);
    }
    let platform = env::var("TARGET")?;
    let metadata = |offline: &[&str]| {
        let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        Command::new(cargo)
            .current_dir(&manifest_dir)
            .args([
                "metadata",
                "--format-version=1",
                "--filter-platform",
                &platform,
            ])
            .args(offline)
            .output()
    };
    let mut output = metadata(&["--offline"])?;
    if !output.status.success() {
        output = metadata(&[])?;
    }
    if !output.status.success() {
        return Err(format!(
            "cargo metadata: {}",
            String::from_utf8_lossy(&output.stderr)
        )
        .into());
    }
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let packages = metadata["packages"]
        .as_array()
        .ok_or("cargo metadata lists no packages")?;
    let manifest = packages
        .iter()
        .find(|package| package["name"] == name)
        .and_then(|package| package["manifest_path"].as_str())
        .ok_or_else(|| format!("cargo metadata does not list {name}"))?;
    Ok(Path::new(manifest)
        .parent()
        .ok_or("a manifest without folder")?
        .to_owned())
}

/// The package's folder in cargo's registry sources, by the version in the lock file.
fn in_registry(manifest_dir: &Path, name: &str) -> Option<PathBuf> {
    let lock = manifest_dir
        .ancestors()
        .map(|dir| dir.join("Cargo.lock"))
        .find(|lock| lock.is_file())?;
    println!("cargo::rerun-if-changed={}", lock.display());
    let text = fs::read_to_string(lock).ok()?;
    let (_, entry) = text.split_once(&format!("name = \"{name}\"\nversion = \""))?;
    let (version, _) = entry.split_once('"')?;
    let home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cargo")))?;
    fs::read_dir(home.join("registry/src"))
        .ok()?
        .flatten()
        .map(|registry| registry.path().join(format!("{name}-{version}")))
        .find(|dir| dir.join("proto").is_dir())
}

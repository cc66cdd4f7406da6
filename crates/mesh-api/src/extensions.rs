//! `extensions.istio.io`: code that runs inside the proxy.

pub mod traffic_extension;
pub mod wasm_plugin;

pub use traffic_extension::TrafficExtension;
pub use wasm_plugin::WasmPlugin;

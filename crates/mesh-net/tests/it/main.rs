//! Capture and balancing, as text and in real network namespaces.

mod golden;
mod kernel;

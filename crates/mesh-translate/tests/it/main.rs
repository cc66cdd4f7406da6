//! Objects in, resources out: golden folders, properties, and the proxy's own compiler as the first reader of what we write.

mod case;
mod golden;
mod properties;
mod requests;

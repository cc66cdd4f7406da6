//! Comes with its first code.

//! Messages between parent and node.

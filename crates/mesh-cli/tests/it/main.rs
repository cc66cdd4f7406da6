//! Tests of the commands against the real API server, over loopback, and of the installation's objects.

mod authority;
mod commands;
mod install;
mod state;
mod world;

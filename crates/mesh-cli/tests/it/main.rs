//! Tests of the commands against the real API server, over loopback, and of the installation's objects.

mod authority;
mod chart;
mod commands;
mod install;
mod installing;
mod kubernetes;
mod manifest;
mod state;
mod tags;
mod webhooks;
mod world;

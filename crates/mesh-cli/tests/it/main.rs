//! Tests of the commands against the real API server, over loopback, and of the installation's objects.

mod authority;
mod chart;
mod commands;
mod helm;
mod install;
mod installing;
mod kubernetes;
mod lock;
mod manifest;
mod proxy_status;
mod state;
mod tags;
mod webhooks;
mod world;

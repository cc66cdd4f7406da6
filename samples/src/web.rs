//! Plain web servers: one page each, by which httpd, tomcat and nginx can be told apart.

use axum::Router;
use axum::response::Html;
use axum::routing::get;

use crate::serve::{self, PortArgs};

/// Name, usual port, and the sentence of the page.
const FLAVOURS: &[(&str, u16, &str)] = &[
    ("httpd", 80, "It works! This page comes from httpd."),
    (
        "tomcat",
        8080,
        "Tomcat is running. This page comes from tomcat.",
    ),
    ("nginx", 80, "Welcome. This page comes from nginx."),
];

pub(crate) fn main(args: &[String]) -> anyhow::Result<()> {
    let names = || {
        FLAVOURS
            .iter()
            .map(|(name, ..)| *name)
            .collect::<Vec<_>>()
            .join(", ")
    };
    let Some((flavour, rest)) = args.split_first() else {
        anyhow::bail!("say which web server to be: {}", names());
    };
    let Some((name, port, _)) = FLAVOURS.iter().find(|(name, ..)| name == flavour) else {
        anyhow::bail!(
            "there is no web server called {flavour:?}; there are: {}",
            names()
        );
    };
    let port = PortArgs::port(rest, *port)?;
    serve::block_on(serve::serve(name, port, router(name)))
}

/// The page of the server `flavour` under every path.
pub fn router(flavour: &str) -> Router {
    let sentence = FLAVOURS
        .iter()
        .find(|(name, ..)| *name == flavour)
        .map_or("It works!", |(.., text)| *text);
    let page = format!(
        "<!DOCTYPE html>\n<html><head><title>{flavour}</title></head><body><h1>{sentence}</h1></body></html>\n"
    );
    let answer = async move || Html(page);
    Router::new()
        .route("/", get(answer.clone()))
        .fallback(get(answer))
}

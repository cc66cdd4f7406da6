//! The HTML of the product page. Every text that comes from another service or from a user is escaped.

use std::fmt::Write as _;

use serde_json::Value;

/// Title of the shop's one book.
pub(super) const BOOK_TITLE: &str = "The Comedy of Errors";

/// What the shop says about it, as HTML.
pub(super) const BOOK_DESCRIPTION: &str = "An early comedy and the shortest of <strong>William Shakespeare</strong>'s \
    plays: two brothers of the same name and their two servants of the same name, parted as children, come to one town \
    on one day, and everybody takes everybody for somebody else.";

/// The start page.
pub(super) const INDEX: &str = include_str!("index.html");

/// The book's cover.
pub(super) const COVER: &str = include_str!("cover.svg");

const PAGE: &str = include_str!("page.html");

/// One part of the page: what its service said, or the text to show instead.
#[derive(Clone, Copy)]
pub(super) enum Section<'a> {
    Value(&'a Value),
    Error(&'a str),
}

/// The product page for `user` (signed in or not).
pub(super) fn render(user: Option<&str>, details: Section<'_>, reviews: Section<'_>) -> String {
    fill(
        PAGE,
        &[
            ("title", BOOK_TITLE),
            ("description", BOOK_DESCRIPTION),
            ("account", &account(user)),
            ("details", &details_section(details)),
            ("reviews", &reviews_section(reviews)),
        ],
    )
}

/// Replaces `{{name}}` in one pass, so that a value is never searched for names.
fn fill(template: &str, values: &[(&str, &str)]) -> String {
    let mut page = String::with_capacity(template.len() * 2);
    let mut rest = template;
    while let Some((before, after)) = rest.split_once("{{") {
        page.push_str(before);
        let (name, after) = after.split_once("}}").unwrap_or((after, ""));
        let value = values.iter().find(|(known, _)| *known == name);
        page.push_str(value.map_or("", |(_, value)| value));
        rest = after;
    }
    page.push_str(rest);
    page
}

fn account(user: Option<&str>) -> String {
    match user {
        Some(user) => format!(
            "<span class=\"user\">{}</span><a class=\"button\" href=\"/logout\">Sign out</a>",
            escape(user)
        ),
        None => "<form method=\"post\" action=\"/login\">\
                 <input name=\"username\" placeholder=\"User name\" aria-label=\"User name\" maxlength=\"64\" required>\
                 <button class=\"button\">Sign in</button></form>"
            .into(),
    }
}

fn failure(title: &str, message: &str) -> String {
    format!(
        "<div class=\"failure\"><h3>{title}</h3><p>{}</p></div>",
        escape(message)
    )
}

fn details_section(details: Section<'_>) -> String {
    let details = match details {
        Section::Error(message) => return failure("Error fetching product details", message),
        Section::Value(details) => details,
    };
    let mut html = String::from("<dl>");
    for (label, field) in [
        ("Author", "author"),
        ("Year", "year"),
        ("Type", "type"),
        ("Pages", "pages"),
        ("Publisher", "publisher"),
        ("Language", "language"),
        ("ISBN-10", "ISBN-10"),
        ("ISBN-13", "ISBN-13"),
    ] {
        if let Some(value) = details.get(field) {
            // Writing to a String cannot fail.
            let _ = write!(
                html,
                "<div><dt>{label}</dt><dd>{}</dd></div>",
                escape(&text(value))
            );
        }
    }
    html.push_str("</dl>");
    html
}

fn reviews_section(reviews: Section<'_>) -> String {
    let reviews = match reviews {
        Section::Error(message) => return failure("Error fetching product reviews", message),
        Section::Value(reviews) => reviews,
    };
    let mut html = String::new();
    for review in reviews
        .get("reviews")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
    {
        let field = |name: &str| review.get(name).map(text).unwrap_or_default();
        let _ = write!(
            html,
            "<figure><blockquote>{}</blockquote><figcaption><span>{}</span>{}</figcaption></figure>",
            escape(&field("text")),
            escape(&field("reviewer")),
            review.get("rating").map(rating).unwrap_or_default()
        );
    }
    let pod = reviews.get("podname").map(text).unwrap_or_default();
    let _ = write!(
        html,
        "<p class=\"served\">Reviews served by: <code>{}</code></p>",
        escape(&pod)
    );
    html
}

fn rating(rating: &Value) -> String {
    if let Some(error) = rating.get("error") {
        return format!("<em class=\"norating\">{}</em>", escape(&text(error)));
    }
    let stars = rating
        .get("stars")
        .and_then(Value::as_i64)
        .unwrap_or(0)
        .clamp(0, 5) as usize;
    let color = rating.get("color").map(text).unwrap_or_default();
    // The colour goes into a style attribute: a plain name or nothing.
    let color = if color.bytes().all(|byte| byte.is_ascii_alphabetic()) {
        color
    } else {
        String::new()
    };
    format!(
        "<span class=\"stars\" style=\"color:{color}\" data-stars=\"{stars}\" data-color=\"{color}\" \
         aria-label=\"{stars} of 5 stars\">{}<span class=\"off\">{}</span></span>",
        "★".repeat(stars),
        "★".repeat(5 - stars)
    )
}

/// A JSON scalar as people write it.
fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn hostile_values_stay_text() {
        let details = json!({ "author": "<script>alert(1)</script>", "type": "{{account}}" });
        let reviews = json!({
            "podname": "\"><b>",
            "reviews": [{ "reviewer": "<i>", "text": "a & b", "rating": { "stars": 99, "color": "red;x:url(y)" } }],
        });

        let html = render(
            Some("<b>jason</b>"),
            Section::Value(&details),
            Section::Value(&reviews),
        );

        assert!(
            !html.contains("<script>alert") && !html.contains("<b>") && !html.contains("url(y)")
        );
        assert!(html.contains("&lt;b&gt;jason&lt;/b&gt;") && html.contains("a &amp; b"));
        assert!(
            html.contains("{{account}}"),
            "a value must not be searched for names"
        );
        assert!(html.contains("data-stars=\"5\""));
    }

    #[test]
    fn every_name_of_the_template_is_filled() {
        let html = render(None, Section::Error("x"), Section::Error("y"));
        assert!(!html.contains("{{"), "{html}");
        assert!(html.contains("<title>Simple Bookstore App</title>"));
    }
}

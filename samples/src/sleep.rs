//! The applet `sleep`: waits, and ends at once when it is told to. (As the first process of a container a plain `sleep`
//! would ignore SIGTERM and so keep its pod for the whole grace period.)

use std::process::ExitCode;
use std::time::Duration;

use crate::serve;

pub(crate) fn main(args: &[String]) -> ExitCode {
    if args.is_empty() {
        eprintln!("sleep: say how long, such as 5, 1.5m or infinity");
        return ExitCode::from(1);
    }
    let mut total = Duration::ZERO;
    for arg in args {
        match parse(arg) {
            Some(time) => total = total.saturating_add(time),
            None => {
                eprintln!(
                    "sleep: {arg:?} is not a time; write a number with an optional unit s, m, h or d, or infinity"
                );
                return ExitCode::from(1);
            }
        }
    }
    let told_to_end = serve::block_on(async {
        let stop = serve::stop_signal()?;
        // A timer further away than tokio's range is as good as none.
        let end = tokio::time::Instant::now().checked_add(total);
        tokio::select! {
            () = stop => Ok(true),
            () = async { match end { Some(end) => tokio::time::sleep_until(end).await, None => std::future::pending().await } } => Ok(false),
        }
    });
    match told_to_end {
        Ok(false) => ExitCode::SUCCESS,
        // As a shell reports the end by SIGTERM.
        Ok(true) => ExitCode::from(143),
        Err(error) => {
            eprintln!("sleep: {error:#}");
            ExitCode::from(1)
        }
    }
}

fn parse(text: &str) -> Option<Duration> {
    if matches!(text, "infinity" | "inf") {
        return Some(Duration::MAX);
    }
    let unit = text
        .find(|letter: char| letter.is_ascii_alphabetic())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(unit);
    let scale = match unit {
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        "d" => 86400.0,
        _ => return None,
    };
    let seconds = number
        .parse::<f64>()
        .ok()
        .filter(|seconds| *seconds >= 0.0)?
        * scale;
    // More than a Duration holds is for ever.
    Some(Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_units() {
        assert_eq!(parse("5"), Some(Duration::from_secs(5)));
        assert_eq!(parse("1.5m"), Some(Duration::from_secs(90)));
        assert_eq!(parse("2d"), Some(Duration::from_secs(172_800)));
        assert_eq!(parse("infinity"), Some(Duration::MAX));
        assert_eq!(parse("99999999999999999999d"), Some(Duration::MAX));
        for bad in ["", "x", "-1", "1w", "1 s"] {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
    }
}

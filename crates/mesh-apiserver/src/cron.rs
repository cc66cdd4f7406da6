//! The schedules of CronJobs: five fields (minute, hour, day of the month, month, day of the week), or `@daily` and its kin, or
//! `@every 1h30m`, as the Go library `robfig/cron` that Kubernetes uses reads them.

use std::time::Duration;

use jiff::civil::Date;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp, ToSpan as _};

/// Days that are looked through for the next run: beyond a leap day that falls into a century.
const HORIZON: usize = 366 * 9;
/// Seconds back in which a missed run is looked for first: an hour, a day, a month, a year.
const LOOK_BACK: [i64; 4] = [3600, 86_400, 31 * 86_400, 366 * 86_400];
const MONTHS: [&str; 12] = [
    "jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec",
];
const DAYS: [&str; 7] = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"];

/// Why a schedule can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CronError {
    /// Not five fields.
    #[error("expected exactly 5 fields, found {0}: use \"MINUTE HOUR DAY MONTH WEEKDAY\"")]
    Fields(usize),
    /// A field that is not numbers, names, ranges and steps within its bounds.
    #[error("{text:?} is not a {field} from {min} to {max}")]
    Field {
        /// What the field says.
        field: &'static str,
        /// What was found.
        text: String,
        /// Lowest value.
        min: u8,
        /// Highest value.
        max: u8,
    },
    /// An `@` form that is not known.
    #[error("unrecognized descriptor: {0}")]
    Descriptor(String),
    /// A zone that the system does not have.
    #[error("unknown time zone {0}")]
    Zone(String),
}

/// When something is to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schedule(Form);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Form {
    /// Bits of the values of each field.
    Fields {
        minute: u64,
        hour: u64,
        day: u64,
        month: u64,
        weekday: u64,
        /// Day or weekday is `*`: both must match, else one of them is enough.
        both: bool,
    },
    Every(Duration),
}

struct Bounds {
    field: &'static str,
    min: u8,
    max: u8,
    names: &'static [&'static str],
}

impl Schedule {
    /// Reads a schedule.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Schedule, CronError> {
        let text = text.trim();
        let fields = match text {
            "@yearly" | "@annually" => "0 0 1 1 *",
            "@monthly" => "0 0 1 * *",
            "@weekly" => "0 0 * * 0",
            "@daily" | "@midnight" => "0 0 * * *",
            "@hourly" => "0 * * * *",
            _ if text.starts_with('@') => {
                let every = text.strip_prefix("@every ").and_then(go_duration);
                let every = every.ok_or_else(|| CronError::Descriptor(text.to_owned()))?;
                return Ok(Schedule(Form::Every(every)));
            }
            _ => text,
        };
        let fields: Vec<&str> = fields.split_whitespace().collect();
        let [minute, hour, day, month, weekday] = fields.as_slice() else {
            return Err(CronError::Fields(fields.len()));
        };
        let any = |text: &str| matches!(text, "*" | "?");
        let weekday_bits = read_field(weekday, &bounds("day of the week", 0, 7, &DAYS))?;
        Ok(Schedule(Form::Fields {
            minute: read_field(minute, &bounds("minute", 0, 59, &[]))?,
            hour: read_field(hour, &bounds("hour", 0, 23, &[]))?,
            day: read_field(day, &bounds("day of the month", 1, 31, &[]))?,
            month: read_field(month, &bounds("month", 1, 12, &MONTHS))?,
            // 7 is Sunday too.
            weekday: (weekday_bits | weekday_bits >> 7) & 0x7f,
            both: any(day) || any(weekday),
        }))
    }

    /// The first time after `after`; `None` where there is none in the years to come (the 30th of February).
    pub fn next(&self, after: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        let Form::Fields { minute, hour, .. } = &self.0 else {
            let Form::Every(every) = &self.0 else {
                return None;
            };
            let whole = Timestamp::from_second(after.as_second()).ok()?;
            return whole
                .checked_add(SignedDuration::try_from(*every).ok()?)
                .ok();
        };
        let mut date = zone.to_datetime(after).date();
        for _ in 0..HORIZON {
            if self.runs_on(date) {
                for at_hour in (0..24_i8).filter(|at| hour >> at & 1 == 1) {
                    for at_minute in (0..60_i8).filter(|at| minute >> at & 1 == 1) {
                        let civil = date.at(at_hour, at_minute, 0, 0);
                        // A time that the clock leaps over on this day does not happen on it.
                        let Ok(zoned) = zone.to_ambiguous_zoned(civil).compatible() else {
                            continue;
                        };
                        if zoned.datetime() == civil && zoned.timestamp() > after {
                            return Some(zoned.timestamp());
                        }
                    }
                }
            }
            date = date.checked_add(1.day()).ok()?;
        }
        None
    }

    /// The last time after `since` and not after `now`; `None` where there is none.
    pub fn latest(&self, since: Timestamp, now: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        if let Form::Every(every) = &self.0 {
            let step = i64::try_from(every.as_secs()).ok()?;
            let count = (now.as_second() - since.as_second()).div_euclid(step);
            let at = since.as_second() + count * step;
            return Timestamp::from_second(at).ok().filter(|_| count > 0);
        }
        // The nearest window that holds a run: a server that was down for a year does not count its minutes.
        let windows = LOOK_BACK.map(|seconds| now.as_second() - seconds);
        for start in windows.into_iter().chain([since.as_second()]) {
            let start = Timestamp::from_second(start).ok()?.max(since);
            let mut found = None;
            let mut at = start;
            while let Some(next) = self.next(at, zone).filter(|next| *next <= now) {
                found = Some(next);
                at = next;
            }
            if found.is_some() || start <= since {
                return found;
            }
        }
        None
    }

    fn runs_on(&self, date: Date) -> bool {
        let Form::Fields {
            day,
            month,
            weekday,
            both,
            ..
        } = &self.0
        else {
            return false;
        };
        let by_day = day >> date.day() & 1 == 1;
        let by_weekday = weekday >> date.weekday().to_sunday_zero_offset() & 1 == 1;
        let on_day = if *both {
            by_day && by_weekday
        } else {
            by_day || by_weekday
        };
        on_day && month >> date.month() & 1 == 1
    }
}

/// The time zone of that name (of the IANA database), UTC for `None`.
///
/// # Errors
/// [`CronError::Zone`] when the system does not know it.
pub fn zone(name: Option<&str>) -> Result<TimeZone, CronError> {
    match name {
        None | Some("UTC" | "Etc/UTC") => Ok(TimeZone::UTC),
        // "Local" is what Kubernetes refuses too: it means another zone on each machine.
        Some(name) if name.eq_ignore_ascii_case("local") || name.is_empty() => {
            Err(CronError::Zone(name.to_owned()))
        }
        Some(name) => TimeZone::get(name).map_err(|_| CronError::Zone(name.to_owned())),
    }
}

fn bounds(field: &'static str, min: u8, max: u8, names: &'static [&'static str]) -> Bounds {
    Bounds {
        field,
        min,
        max,
        names,
    }
}

/// A list of values, ranges and steps as bits.
fn read_field(text: &str, bounds: &Bounds) -> Result<u64, CronError> {
    let mut bits = 0;
    for part in text.split(',') {
        bits |= read_part(part, bounds).ok_or_else(|| CronError::Field {
            field: bounds.field,
            text: text.to_owned(),
            min: bounds.min,
            max: bounds.max,
        })?;
    }
    Ok(bits)
}

fn read_part(part: &str, bounds: &Bounds) -> Option<u64> {
    let (range, step) = match part.split_once('/') {
        Some((range, step)) => (
            range,
            Some(step.parse::<u8>().ok().filter(|step| *step > 0)?),
        ),
        None => (part, None),
    };
    let (first, last) = match (range, range.split_once('-')) {
        // The 7 of the weekdays is a second name, not an eighth day.
        ("*" | "?", _) => (bounds.min, bounds.max - u8::from(bounds.max == 7)),
        (_, Some((first, last))) => (value(first, bounds)?, value(last, bounds)?),
        (_, None) => {
            let first = value(range, bounds)?;
            // "5/15" means from 5 on.
            (first, if step.is_some() { bounds.max } else { first })
        }
    };
    (first <= last).then(|| {
        (first..=last)
            .step_by(usize::from(step.unwrap_or(1)))
            .fold(0, |bits, at| bits | 1 << at)
    })
}

fn value(text: &str, bounds: &Bounds) -> Option<u8> {
    let lower = text.to_ascii_lowercase();
    let named = bounds.names.iter().position(|name| *name == lower);
    let value = match named {
        Some(index) => u8::try_from(index).ok()? + bounds.min,
        None => text.parse().ok()?,
    };
    (bounds.min..=bounds.max).contains(&value).then_some(value)
}

/// `1h30m`, at least a second.
fn go_duration(text: &str) -> Option<Duration> {
    let (mut rest, mut seconds) = (text.trim(), 0_u64);
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let number: u64 = rest[..digits].parse().ok()?;
        let factor = match rest[digits..].chars().next()? {
            'h' => 3600,
            'm' => 60,
            's' => 1,
            _ => return None,
        };
        seconds = seconds.checked_add(number.checked_mul(factor)?)?;
        rest = &rest[digits + 1..];
    }
    (seconds > 0).then(|| Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn next(schedule: &str, after: &str) -> String {
        let schedule = Schedule::parse(schedule).unwrap();
        let next = schedule.next(after.parse().unwrap(), &TimeZone::UTC);
        next.map_or_else(|| "never".to_owned(), |next| next.to_string())
    }

    #[test]
    fn the_next_time_follows_the_fields() {
        // 2026-01-01 is a Thursday.
        for (schedule, after, expected) in [
            ("* * * * *", "2026-01-01T00:00:30Z", "2026-01-01T00:01:00Z"),
            ("* * * * *", "2026-01-01T00:01:00Z", "2026-01-01T00:02:00Z"),
            (
                "*/15 * * * *",
                "2026-01-01T00:46:00Z",
                "2026-01-01T01:00:00Z",
            ),
            (
                "5/20 * * * *",
                "2026-01-01T00:06:00Z",
                "2026-01-01T00:25:00Z",
            ),
            ("30 2 * * *", "2026-01-01T02:30:00Z", "2026-01-02T02:30:00Z"),
            ("0 0 1 * *", "2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z"),
            (
                "0 9 * * MON-FRI",
                "2026-01-02T09:00:00Z",
                "2026-01-05T09:00:00Z",
            ),
            ("0 0 * * 7", "2026-01-01T00:00:00Z", "2026-01-04T00:00:00Z"),
            // Day and weekday: one of them is enough.
            ("0 0 13 * 5", "2026-01-01T12:00:00Z", "2026-01-02T00:00:00Z"),
            (
                "0 0 29 feb *",
                "2026-01-01T00:00:00Z",
                "2028-02-29T00:00:00Z",
            ),
            ("0 0 30 2 *", "2026-01-01T00:00:00Z", "never"),
            ("@hourly", "2026-01-01T00:00:00Z", "2026-01-01T01:00:00Z"),
            (
                "@every 1h30m",
                "2026-01-01T00:00:00Z",
                "2026-01-01T01:30:00Z",
            ),
        ] {
            assert_eq!(next(schedule, after), expected, "{schedule} after {after}");
        }
    }

    #[test]
    fn the_latest_missed_time_is_found() {
        let latest = |schedule: &str, since: &str, now: &str| {
            let schedule = Schedule::parse(schedule).unwrap();
            let latest =
                schedule.latest(since.parse().unwrap(), now.parse().unwrap(), &TimeZone::UTC);
            latest.map_or_else(|| "none".to_owned(), |time| time.to_string())
        };
        for (schedule, since, now, expected) in [
            (
                "* * * * *",
                "2025-01-01T00:00:00Z",
                "2026-01-01T00:00:30Z",
                "2026-01-01T00:00:00Z",
            ),
            (
                "0 0 1 1 *",
                "2024-06-01T00:00:00Z",
                "2026-07-01T00:00:00Z",
                "2026-01-01T00:00:00Z",
            ),
            (
                "0 0 29 2 *",
                "2020-01-01T00:00:00Z",
                "2027-07-01T00:00:00Z",
                "2024-02-29T00:00:00Z",
            ),
            (
                "0 * * * *",
                "2026-01-01T00:00:00Z",
                "2026-01-01T00:59:59Z",
                "none",
            ),
            (
                "@every 10s",
                "2026-01-01T00:00:00Z",
                "2026-01-01T00:00:25Z",
                "2026-01-01T00:00:20Z",
            ),
            (
                "@every 10s",
                "2026-01-01T00:00:00Z",
                "2026-01-01T00:00:09Z",
                "none",
            ),
        ] {
            assert_eq!(
                latest(schedule, since, now),
                expected,
                "{schedule} {since} {now}"
            );
        }
    }

    #[test]
    fn a_zone_moves_the_hours_and_a_leap_of_the_clock_skips_them() {
        let zone = TimeZone::posix("CET-1CEST,M3.5.0,M10.5.0/3").unwrap();
        let schedule = Schedule::parse("30 2 * * *").unwrap();
        let at = |text: &str| text.parse::<Timestamp>().unwrap();
        assert_eq!(
            schedule.next(at("2026-01-01T00:00:00Z"), &zone),
            Some(at("2026-01-01T01:30:00Z"))
        );
        // On 29 March 2026 the clock goes from two to three.
        assert_eq!(
            schedule.next(at("2026-03-28T12:00:00Z"), &zone),
            Some(at("2026-03-30T00:30:00Z"))
        );
    }

    #[test]
    fn bad_schedules_are_told() {
        for text in [
            "",
            "* * * *",
            "60 * * * *",
            "* 24 * * *",
            "* * 0 * *",
            "* * * 13 *",
            "* * * * 8",
            "5-1 * * * *",
            "*/0 * * * *",
            "a * * * *",
            "@sometimes",
            "@every",
            "@every 0s",
        ] {
            assert!(Schedule::parse(text).is_err(), "{text:?}");
        }
        assert!(zone(Some("Nowhere/Land")).is_err());
        assert!(zone(Some("Local")).is_err());
        assert_eq!(zone(None).unwrap(), TimeZone::UTC);
    }
}

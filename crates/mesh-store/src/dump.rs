//! The store as JSON lines: one `{"tree","key","json"|"hex"}` per value, for backups, bug reports and repair by hand.

use std::io::{BufRead, Write};

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::recovery::MARKER;
use crate::{Batch, SEPARATOR, Store, StoreError, open_value};

/// Changes applied at once while importing.
const IMPORT_BATCH: usize = 256;

/// What can go wrong while exporting or importing.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Reading or writing the text failed.
    #[error("reading or writing the export: {0}")]
    Io(#[from] std::io::Error),
    /// A line is not one of ours.
    #[error("line {line} of the import: {reason}; nothing from this line on was imported")]
    Line {
        /// Line number, from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
}

/// Result of [`Store::check`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Values read.
    pub values: usize,
    /// Bytes of all values, without checksums.
    pub bytes: u64,
    /// Damaged values, written `tree/key`.
    pub damaged: Vec<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line<'a> {
    tree: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    key: Option<String>,
    #[serde(default, rename = "keyHex", skip_serializing_if = "Option::is_none")]
    key_hex: Option<String>,
    #[serde(default, borrow, skip_serializing_if = "Option::is_none")]
    json: Option<&'a RawValue>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    hex: Option<String>,
}

impl Store {
    /// Writes every value as one JSON line; returns how many.
    ///
    /// # Errors
    /// [`DumpError::Io`] from the writer; [`StoreError::Checksum`] at a damaged value.
    pub fn export(&self, mut out: impl Write) -> Result<usize, DumpError> {
        let mut count = 0;
        for item in self.values() {
            let (full, stored) = item?;
            let (tree, key) = split_key(&full);
            let value = open_value(&stored).ok_or_else(|| StoreError::Checksum {
                tree: tree.clone(),
                key: String::from_utf8_lossy(key).into_owned(),
            })?;
            // A value is shown as JSON where that gives back the same bytes on one line.
            let json = std::str::from_utf8(value)
                .ok()
                .filter(|text| !text.contains('\n') && text.trim().len() == text.len())
                .and_then(|text| serde_json::from_str::<&RawValue>(text).ok());
            let text_key = std::str::from_utf8(key).ok().map(str::to_owned);
            let line = Line {
                tree,
                key_hex: text_key.is_none().then(|| to_hex(key)),
                key: text_key,
                hex: json.is_none().then(|| to_hex(value)),
                json,
            };
            serde_json::to_writer(&mut out, &line).map_err(std::io::Error::from)?;
            out.write_all(b"\n")?;
            count += 1;
        }
        out.flush()?;
        Ok(count)
    }

    /// Reads lines that [`Store::export`] wrote, over what is there, and flushes; returns how many.
    ///
    /// # Errors
    /// [`DumpError::Line`] at the first line that does not parse.
    pub fn import(&self, input: impl BufRead) -> Result<usize, DumpError> {
        let (mut batch, mut pending, mut count) = (Batch::new(), 0, 0);
        for (index, text) in input.lines().enumerate() {
            let text = text?;
            if text.trim().is_empty() {
                continue;
            }
            let (tree, key, value) = parse_line(&text).map_err(|reason| DumpError::Line {
                line: index + 1,
                reason,
            })?;
            batch.insert(&self.tree(&tree)?, key, value);
            pending += 1;
            count += 1;
            if pending == IMPORT_BATCH {
                self.batch(std::mem::take(&mut batch))?;
                pending = 0;
            }
        }
        self.commit(batch)?;
        Ok(count)
    }

    /// Reads everything and checks every checksum.
    ///
    /// # Errors
    /// [`StoreError::Engine`] when the files can't be read at all.
    pub fn check(&self) -> Result<CheckReport, StoreError> {
        let mut report = CheckReport::default();
        for item in self.values() {
            let (full, stored) = item?;
            match open_value(&stored) {
                Some(value) => {
                    report.values += 1;
                    report.bytes += value.len() as u64;
                }
                None => {
                    let (tree, key) = split_key(&full);
                    report
                        .damaged
                        .push(format!("{tree}/{}", String::from_utf8_lossy(key)));
                }
            }
        }
        Ok(report)
    }

    fn values(&self) -> impl Iterator<Item = Result<(sled::IVec, sled::IVec), StoreError>> {
        let all = self.db.iter().map(|item| item.map_err(StoreError::from));
        all.filter(|item| !matches!(item, Ok((key, _)) if key == MARKER))
    }
}

fn split_key(full: &[u8]) -> (String, &[u8]) {
    let at = full
        .iter()
        .position(|b| *b == SEPARATOR)
        .unwrap_or(full.len());
    let key = full.get(at + 1..).unwrap_or_default();
    (String::from_utf8_lossy(&full[..at]).into_owned(), key)
}

fn parse_line(text: &str) -> Result<(String, Vec<u8>, Vec<u8>), String> {
    let line: Line<'_> = serde_json::from_str(text).map_err(|e| e.to_string())?;
    let key = match (line.key, line.key_hex) {
        (Some(key), None) => key.into_bytes(),
        (None, Some(hex)) => from_hex(&hex).ok_or("keyHex is not hexadecimal")?,
        _ => return Err("needs exactly one of key and keyHex".to_owned()),
    };
    let value = match (line.json, line.hex) {
        (Some(json), None) => json.get().as_bytes().to_vec(),
        (None, Some(hex)) => from_hex(&hex).ok_or("hex is not hexadecimal")?,
        _ => return Err("needs exactly one of json and hex".to_owned()),
    };
    Ok((line.tree, key, value))
}

fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits: Vec<u8> = text
        .chars()
        .map(|c| c.to_digit(16).map(|d| d as u8))
        .collect::<Option<_>>()?;
    digits.len().is_multiple_of(2).then(|| {
        digits
            .chunks(2)
            .map(|pair| pair[0] << 4 | pair[1])
            .collect()
    })
}

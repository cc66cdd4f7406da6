//! Users of the local cluster's API, from a file in the form of Kubernetes' static token file (`--token-auth-file`): lines of
//! `token,user,uid` and, where there are some, the groups as one quoted field with commas.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

/// A user with a bearer token of his own. What he may do is up to roles.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterUser {
    /// The bearer token.
    pub token: String,
    /// User name.
    pub name: String,
    /// Uid; may be empty.
    pub uid: String,
    /// Groups, beside `system:authenticated`.
    pub groups: Vec<String>,
}

impl std::fmt::Debug for ClusterUser {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClusterUser")
            .field("name", &self.name)
            .field("groups", &self.groups)
            .finish_non_exhaustive()
    }
}

/// What is wrong with a file of users; lines count from 1.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UserFileError {
    /// Not the fields that there must be.
    #[error("line {0}: expected token,user,uid and possibly \"group1,group2\"")]
    Fields(usize),
    /// A quote that does not end where a field does.
    #[error("line {0}: a quoted field must be quoted as a whole, with \"\" for a quote in it")]
    Quotes(usize),
    /// Two users can't have one token.
    #[error("line {0}: another user has the same token; give each his own")]
    Duplicate(usize),
}

impl ClusterUser {
    /// Reads the file's text; empty lines are skipped.
    ///
    /// # Errors
    /// See [`UserFileError`].
    pub fn list(text: &str) -> Result<Vec<ClusterUser>, UserFileError> {
        let mut users: Vec<ClusterUser> = Vec::new();
        let mut tokens = HashSet::new();
        for (index, line) in text.lines().enumerate() {
            let number = index + 1;
            if line.trim().is_empty() {
                continue;
            }
            let fields = fields(line).ok_or(UserFileError::Quotes(number))?;
            let (token, name, uid, groups) = match fields.as_slice() {
                [token, name, uid] => (token, name, uid, ""),
                [token, name, uid, groups] => (token, name, uid, groups.as_str()),
                _ => return Err(UserFileError::Fields(number)),
            };
            if token.is_empty() || name.is_empty() {
                return Err(UserFileError::Fields(number));
            }
            if !tokens.insert(token.clone()) {
                return Err(UserFileError::Duplicate(number));
            }
            let groups = groups.split(',').map(str::trim).filter(|g| !g.is_empty());
            users.push(ClusterUser {
                token: token.clone(),
                name: name.clone(),
                uid: uid.clone(),
                groups: groups.map(str::to_owned).collect(),
            });
        }
        Ok(users)
    }
}

/// The fields of a line of CSV (RFC 4180, one record a line); `None` for quotes out of place.
fn fields(line: &str) -> Option<Vec<String>> {
    let mut fields = Vec::new();
    let mut rest = line.trim();
    loop {
        let Some(quoted) = rest.strip_prefix('"') else {
            let (field, after) = match rest.split_once(',') {
                Some((field, after)) => (field, Some(after)),
                None => (rest, None),
            };
            if field.contains('"') {
                return None;
            }
            fields.push(field.trim().to_owned());
            match after {
                Some(after) => rest = after.trim_start(),
                None => return Some(fields),
            }
            continue;
        };
        let mut field = String::new();
        let mut left = quoted;
        let after = loop {
            let (text, after) = left.split_once('"')?;
            field.push_str(text);
            match after.strip_prefix('"') {
                Some(more) => {
                    field.push('"');
                    left = more;
                }
                None => break after.trim_start(),
            }
        };
        fields.push(field);
        if after.is_empty() {
            return Some(fields);
        }
        rest = after.strip_prefix(',')?.trim_start();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_users() {
        let users = ClusterUser::list("t1,jane,7\n\nt2, ben ,,\"ops, dev\"\n\"t,3\",cat,9,ops\n");
        let users = users.unwrap();
        let short: Vec<_> = users
            .iter()
            .map(|u| {
                (
                    u.token.as_str(),
                    u.name.as_str(),
                    u.uid.as_str(),
                    u.groups.join("+"),
                )
            })
            .collect();
        assert_eq!(
            short,
            [
                ("t1", "jane", "7", String::new()),
                ("t2", "ben", "", "ops+dev".to_owned()),
                ("t,3", "cat", "9", "ops".to_owned()),
            ]
        );
        assert!(!format!("{users:?}").contains("t1"));
    }

    #[test]
    fn bad_lines_are_named() {
        for (text, expected) in [
            ("t,jane", UserFileError::Fields(1)),
            (",jane,1", UserFileError::Fields(1)),
            ("t,jane,1,ops,dev", UserFileError::Fields(1)),
            ("a,b,1\nt,\"jane,1", UserFileError::Quotes(2)),
            ("a,b,1\nt,\"jane\"x,1", UserFileError::Quotes(2)),
            ("a,b,1\na,c,2", UserFileError::Duplicate(2)),
        ] {
            assert_eq!(ClusterUser::list(text), Err(expected), "{text}");
        }
    }
}

//! The variables that the TLS and HTTP libraries read for themselves: looked at here, so that a mistake in one is a mistake in the
//! settings that names it, and neither ignored in silence nor a failure without a name.
//!
//! The libraries read the environment of the process and nothing else; so does this.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use super::reader::Reader;
use super::vars::Vars;

/// Of a file with certificates no more is looked at; bundles have some hundred KiB.
const MAX_BYTES: u64 = 16 << 20;
const CERTIFICATE: &[u8] = b"-----BEGIN CERTIFICATE-----";
/// The libraries take either spelling.
const PROXIES: [&str; 4] = ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"];

pub(super) fn check(reader: &mut Reader<'_, impl Vars>) {
    let file = path(reader, "SSL_CERT_FILE");
    let folders = path(reader, "SSL_CERT_DIR");
    if let Some(file) = &file {
        let found = holds_certificate(file);
        refuse_without(reader, "SSL_CERT_FILE", file, found);
    }
    for folder in folders.iter().flat_map(std::env::split_paths).filter(|folder| !folder.as_os_str().is_empty()) {
        // An empty folder beside a file is nothing wrong.
        let found = folder_holds_certificate(&folder).map(|found| found || file.is_some());
        refuse_without(reader, "SSL_CERT_DIR", &folder, found);
    }
    for name in PROXIES {
        if let Some(value) = reader.of_process(name).filter(|value| !value.trim().is_empty())
            && !is_proxy(&value)
        {
            let shown = reader.shown(name, &value);
            reader.mistake(name, format!("{shown} is no proxy; expected `http://host:port` or `https://host:port`"));
        }
    }
}

/// Unset and empty are not the same to the TLS library.
fn path(reader: &mut Reader<'_, impl Vars>, name: &str) -> Option<PathBuf> {
    let value = reader.of_process(name)?;
    if value.trim().is_empty() {
        reader.mistake(name, "is set to nothing, which the TLS library takes for a path; leave the variable out");
        return None;
    }
    Some(value.into())
}

fn refuse_without(reader: &mut Reader<'_, impl Vars>, name: &str, path: &Path, found: io::Result<bool>) {
    let problem = match found {
        Ok(true) => return,
        Ok(false) => "holds no certificate in PEM; expected at least one certificate authority".to_owned(),
        Err(error) => format!("cannot be read: {error}"),
    };
    let shown = reader.shown(name, &path.display().to_string());
    reader.mistake(name, format!("{shown} {problem}"));
}

fn holds_certificate(path: &Path) -> io::Result<bool> {
    let mut content = Vec::new();
    File::open(path)?.take(MAX_BYTES).read_to_end(&mut content)?;
    Ok(content.windows(CERTIFICATE.len()).any(|window| window == CERTIFICATE))
}

fn folder_holds_certificate(folder: &Path) -> io::Result<bool> {
    // A file that cannot be read costs only itself, as with the library.
    let entries = std::fs::read_dir(folder)?.filter_map(Result::ok);
    Ok(entries
        .map(|entry| entry.path())
        .filter(|path| path.is_file())
        .any(|path| holds_certificate(&path).unwrap_or(false)))
}

/// What the HTTP library takes for one; without a scheme it is `http`.
fn is_proxy(value: &str) -> bool {
    let Ok(uri) = value.parse::<http::Uri>() else { return false };
    uri.scheme_str().is_none_or(|scheme| matches!(scheme, "http" | "https"))
        && uri.authority().is_some_and(|authority| !authority.host().is_empty())
}

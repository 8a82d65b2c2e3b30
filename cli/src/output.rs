//! Files that are written whole or not at all.

use std::fs::{self, File, Permissions};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use tempfile::{Builder, NamedTempFile};

/// A file to come. Nothing is there, or what was there stays, until [`Output::write`] has succeeded.
pub struct Output {
    /// As the user spelled it, for messages.
    name: PathBuf,
    /// What the last link leads to: a link is kept, and its target replaced.
    target: PathBuf,
    permissions: Option<Permissions>,
}

impl Output {
    /// Checks that `path` can be written, before any work is done for it.
    pub fn at(path: &Path) -> anyhow::Result<Self> {
        let shown = path.display();
        let (target, permissions) = match fs::metadata(path) {
            Ok(found) if found.is_file() && !found.permissions().readonly() => {
                let target = fs::canonicalize(path).with_context(|| format!("{shown}: cannot be found"))?;
                (target, Some(found.permissions()))
            }
            Ok(found) if found.is_file() => {
                bail!("{shown}: expected a file that may be written, got a read-only one")
            }
            Ok(_) => bail!("{shown}: expected the path of a file, got something that is there and is none"),
            Err(_) => (path.to_owned(), None),
        };
        if target.file_name().is_none() {
            bail!("{shown}: expected the path of a file");
        }
        let output = Output { name: path.to_owned(), target, permissions };
        // Made and dropped: a missing folder or one without permission is known at once.
        output.temporary()?;
        Ok(output)
    }

    fn folder(&self) -> &Path {
        match self.target.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        }
    }

    /// An empty file in the same folder, for only a rename within one file system is whole or nothing.
    fn temporary(&self) -> anyhow::Result<NamedTempFile> {
        let mut builder = Builder::new();
        builder.prefix(".dla-").suffix(".part");
        // Without this a file would be for its owner alone; the umask still applies.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        builder.tempfile_in(self.folder()).with_context(|| {
            format!("{}: cannot write into {}", self.name.display(), self.folder().display())
        })
    }

    /// Writes the file: beside its place, through to the disk, then renamed into it.
    pub fn write(self, bytes: &[u8]) -> anyhow::Result<()> {
        let context = || format!("{}: cannot be written", self.name.display());
        let mut file = self.temporary()?;
        file.write_all(bytes).with_context(context)?;
        if let Some(permissions) = &self.permissions {
            file.as_file().set_permissions(permissions.clone()).with_context(context)?;
        }
        file.as_file().sync_all().with_context(context)?;
        file.persist(&self.target).map_err(|error| error.error).with_context(context)?;
        // The name too should outlast a crash; where folders cannot be synced the file itself is whole.
        if let Ok(folder) = File::open(self.folder()) {
            let _ = folder.sync_all();
        }
        Ok(())
    }
}

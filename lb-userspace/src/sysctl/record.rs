//! What was changed on the host, on record: an agent that comes later, or `wharf cleanup`, puts it back.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use tracing::warn;

use super::ports::Ports;

/// What was changed, in a file that outlives the agent.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Record {
    /// Where it is kept.
    #[serde(skip)]
    file: PathBuf,
    /// Settings in the order in which they were changed.
    settings: Vec<Setting>,
    /// The ports that are reserved and were not before.
    reserved: Ports,
    /// The numbers of the interfaces that have a clsact qdisc of ours.
    qdiscs: Vec<u32>,
    /// The numbers of the interfaces that have GRO on and had it off.
    #[serde(default)]
    gro: Vec<u32>,
    /// Where the last agent has pinned, if that is not the usual place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pins: Option<PathBuf>,
}

/// A setting that was changed.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Setting {
    /// Its file below /proc/sys.
    pub(super) path: PathBuf,
    /// What it was.
    pub(super) before: String,
    /// What it became.
    pub(super) ours: String,
}

impl Record {
    /// What a former agent wrote; nothing if there was none.
    pub(super) fn read(file: &Path) -> Self {
        let read = fs::read(file).and_then(|text| serde_json::from_slice(&text).map_err(io::Error::other));
        let record = read.unwrap_or_else(|error| {
            if error.kind() != io::ErrorKind::NotFound {
                warn!(%error, "cannot read {}: what a former wharf changed on this host stays changed", file.display());
            }
            Self::default()
        });
        Self { file: file.to_owned(), ..record }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.settings.is_empty() && self.reserved.is_empty() && self.qdiscs.is_empty() && self.gro.is_empty()
    }

    /// Notes what a setting was. What is noted already is older, and stays.
    pub(super) fn note(&mut self, setting: Setting) {
        if !self.settings.iter().any(|noted| noted.path == setting.path) {
            self.settings.push(setting);
        }
    }

    pub(super) fn note_reserved(&mut self, ports: Ports) {
        self.reserved = ports;
    }

    pub(super) fn note_qdiscs(&mut self, interfaces: impl IntoIterator<Item = u32>) {
        self.qdiscs.extend(interfaces);
    }

    pub(super) fn forget_qdiscs(&mut self, gone: &[u32]) {
        self.qdiscs.retain(|interface| !gone.contains(interface));
    }

    /// Says whether that is news.
    pub(super) fn note_pins(&mut self, pins: Option<&Path>) -> bool {
        let is_news = self.pins.as_deref() != pins;
        self.pins = pins.map(Path::to_owned);
        is_news
    }

    pub(super) fn pins(&self) -> Option<&Path> {
        self.pins.as_deref()
    }

    pub(super) fn note_gro(&mut self, interface: u32) {
        if !self.gro.contains(&interface) {
            self.gro.push(interface);
        }
    }

    /// Takes out the interfaces that have GRO on and had it off, but those where it is to stay.
    pub(super) fn take_gro(&mut self, stays: impl Fn(u32) -> bool) -> Vec<u32> {
        let (stay, taken) = std::mem::take(&mut self.gro).into_iter().partition(|&interface| stays(interface));
        self.gro = stay;
        taken
    }

    pub(super) fn reserved(&self) -> &Ports {
        &self.reserved
    }

    pub(super) fn qdiscs(&self) -> &[u32] {
        &self.qdiscs
    }

    /// Takes all settings out, the last one that was changed first.
    pub(super) fn take_settings(&mut self) -> impl Iterator<Item = Setting> + use<> {
        std::mem::take(&mut self.settings).into_iter().rev()
    }

    /// Writes it, whole or not at all.
    pub(super) fn write(&self) {
        let new = self.file.with_extension("new");
        let text = serde_json::to_vec_pretty(self).map_err(io::Error::other);
        let written = text.and_then(|text| fs::write(&new, text)).and_then(|()| fs::rename(&new, &self.file));
        if let Err(error) = written {
            warn!(%error, "cannot write {}: `wharf cleanup` will not know what to put back", self.file.display());
        }
    }

    /// Forgets everything, and removes the file.
    pub(super) fn clear(&mut self) {
        let file = std::mem::take(&mut self.file);
        if let Err(error) = fs::remove_file(&file)
            && error.kind() != io::ErrorKind::NotFound
        {
            warn!(%error, "cannot remove {}", file.display());
        }
        *self = Self { file, ..Self::default() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_outlives_its_writer_and_the_oldest_value_stays() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("netns-1.json");
        let mut record = Record::read(&file);
        assert!(record.is_empty());
        let setting = |path: &str, before: &str| Setting { path: path.into(), before: before.into(), ours: "1".into() };
        record.note(setting("a", "0"));
        record.note(setting("b", "2"));
        record.note(setting("a", "1"));
        record.note_reserved("1024-2047".parse().unwrap());
        record.note_qdiscs([7]);
        for interface in [7, 8, 7] {
            record.note_gro(interface);
        }
        record.write();
        let mut again = Record::read(&file);
        assert_eq!((again.reserved().to_string().as_str(), again.qdiscs()), ("1024-2047", &[7][..]));
        assert_eq!((again.take_gro(|it| it == 7), again.take_gro(|_| false)), (vec![8], vec![7]));
        let settings: Vec<_> = again.take_settings().collect();
        assert_eq!(settings, [setting("b", "2"), setting("a", "0")]);
        again.clear();
        assert!(!file.exists() && Record::read(&file).is_empty());
    }

    #[test]
    fn a_record_of_a_former_version_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("netns-1.json");
        fs::write(&file, r#"{"settings":[],"reserved":"","qdiscs":[7]}"#).unwrap();
        assert_eq!(Record::read(&file).qdiscs(), [7]);
    }

    #[test]
    fn a_file_that_makes_no_sense_is_no_record() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("netns-1.json");
        fs::write(&file, "{").unwrap();
        assert!(Record::read(&file).is_empty());
    }
}

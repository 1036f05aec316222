//! Which of some control groups are there: they come and go with what runs in them.

use std::{
    collections::{BTreeSet, HashSet},
    ffi::OsString,
    path::{Component, PathBuf},
};

use futures::{StreamExt as _, future};
use inotify::{EventMask, EventStream, Inotify, WatchMask};
use tracing::warn;

use super::Root;

/// Watches over control groups, by their names from the root on.
pub struct Watch {
    root: Root,
    names: Vec<PathBuf>,
    /// Every part of the names.
    parts: HashSet<OsString>,
    /// What happens in the directories above; `None` where the kernel does not tell.
    events: Option<EventStream<[u8; 4096]>>,
}

impl Watch {
    /// Begins to watch; where it can't be told of changes, [`Watch::ids`] tells what is there all the same.
    pub fn over(root: Root, names: &[PathBuf]) -> Self {
        let parts = names.iter().flat_map(|name| name.components()).map(|part| part.as_os_str().to_owned()).collect();
        let start = || Inotify::init()?.into_event_stream([0; 4096]);
        let events = (!names.is_empty()).then(start).and_then(|events| {
            events.inspect_err(|error| warn!(%error, "without inotify, control groups that come are found late")).ok()
        });
        Self { root, names: names.to_owned(), parts, events }
    }

    /// The ids of those that are there now. From now on [`Watch::change`] tells of others.
    pub fn ids(&mut self) -> BTreeSet<u64> {
        self.names
            .iter()
            .filter_map(|name| {
                let mut directory = self.root.directory().to_owned();
                for part in name.components().filter(|it| matches!(it, Component::Normal(_))) {
                    // Before what is in it is looked at: nothing that comes in between is missed.
                    if let Some(mut watches) = self.events.as_ref().map(EventStream::watches) {
                        // It fails where there is none, as the look does.
                        let _known =
                            watches.add(&directory, WatchMask::CREATE | WatchMask::DELETE | WatchMask::ONLYDIR);
                    }
                    directory.push(part);
                }
                self.root.id(name)
            })
            .collect()
    }

    /// Waits until there may be others than before.
    pub async fn change(&mut self) {
        let Some(events) = &mut self.events else { return future::pending().await };
        while let Some(Ok(event)) = events.next().await {
            let is_meant = event.name.as_ref().is_some_and(|name| self.parts.contains(name));
            // The kernel's queue may have been too short.
            if is_meant || event.mask.contains(EventMask::Q_OVERFLOW) {
                return;
            }
        }
        self.events = None;
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::MetadataExt as _, time::Duration};

    use tokio::time::timeout;

    use super::*;

    /// Directories are named by numbers as control groups are.
    #[tokio::test]
    async fn what_comes_and_goes_is_told_at_any_depth() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let id = |name: &str| fs::metadata(path(name)).unwrap().ino();
        let root = Root { directory: directory.path().to_owned(), mount: None };
        let mut watch = Watch::over(root, &["/a".into(), "/b/c/d".into()]);
        let soon = Duration::from_secs(10);
        assert!(watch.ids().is_empty());

        fs::create_dir(path("a")).unwrap();
        timeout(soon, watch.change()).await.expect("a has come");
        assert_eq!(watch.ids(), BTreeSet::from([id("a")]));

        for name in ["b", "b/c", "b/c/d"] {
            fs::create_dir(path(name)).unwrap();
            timeout(soon, watch.change()).await.expect(name);
            watch.ids();
        }
        assert_eq!(watch.ids(), BTreeSet::from([id("a"), id("b/c/d")]));

        // Others, and what is in them, are of no interest.
        fs::create_dir_all(path("other/a")).unwrap();
        fs::create_dir(path("b/c/other")).unwrap();
        timeout(Duration::from_millis(200), watch.change()).await.expect_err("nothing that was meant");

        fs::remove_dir_all(path("b")).unwrap();
        while watch.ids() != BTreeSet::from([id("a")]) {
            timeout(soon, watch.change()).await.expect("b has gone");
        }
        // Many levels at once: what comes between two looks is not missed.
        fs::create_dir_all(path("b/c/d")).unwrap();
        timeout(soon, watch.change()).await.expect("b is back");
        assert_eq!(watch.ids(), BTreeSet::from([id("a"), id("b/c/d")]));
    }
}

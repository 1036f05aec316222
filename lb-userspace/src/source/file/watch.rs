//! Following a services file: as it is at the start, then each time that its content changes.
//!
//! The kernel says when a file of the directory was closed after writing, or renamed into place: that is when its
//! content is whole. The rest is found by a look twice a second: that the file went away, or that it is a link and
//! changed where that points. Such a change is read only when two looks found the same, as someone may still be writing.

use std::{
    ffi::OsString,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt as _, future};
use inotify::{EventMask, EventStream, Inotify, WatchDescriptor, WatchMask};
use tokio::{
    sync::mpsc,
    task,
    time::{self, MissedTickBehavior},
};
use tracing::warn;

use super::{FileError, parse, read};
use crate::source::{SourceError, Update};

/// Between two looks.
const LOOK: Duration = Duration::from_millis(500);

/// Follows a services file for as long as somebody receives its updates.
///
/// The first update comes at once; after that one for each change of the content, and one for each message on
/// `reload`, changed or not.
///
/// It is read for the node that is called so.
pub async fn watch(
    path: PathBuf,
    node: Option<Arc<str>>,
    mut reload: mpsc::Receiver<()>,
    updates: mpsc::Sender<Update>,
) {
    let mut directory = Directory::of(&path);
    let mut looks = time::interval(LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut known = Known::default();
    let mut why = Why::Asked;
    loop {
        // On a thread of its own: a large file takes a second.
        let looked = task::spawn_blocking({
            let (path, node) = (path.clone(), node.clone());
            move || look(&path, node.as_deref(), known, why)
        });
        let update = match looked.await {
            Ok((now, update)) => {
                known = now;
                update
            }
            Err(panicked) => {
                Some(Err(FileError::Read { path: path.clone(), cause: io::Error::other(panicked) }.into()))
            }
        };
        if let Some(update) = update
            && updates.send(update).await.is_err()
        {
            return;
        }
        why = tokio::select! {
            () = updates.closed() => return,
            Some(()) = reload.recv() => Why::Asked,
            why = directory.change() => why,
            _ = looks.tick() => {
                directory.follow();
                Why::Looked
            }
        };
    }
}

/// Why to look at the file now.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Why {
    /// Someone wants an update in any case.
    Asked,
    /// It was written, and closed.
    Written,
    /// Something was renamed beside it: perhaps the directory that it is in by a link, as in a Kubernetes `ConfigMap`.
    Moved,
    /// Time went by.
    Looked,
}

/// What earlier looks found.
#[derive(Clone, Copy, Default)]
struct Known {
    /// At the last look.
    seen: Option<Stamp>,
    /// Before the last reading.
    read: Option<Stamp>,
    /// A hash of what was read last, or of why it could not be.
    content: Option<u64>,
}

/// What tells two states of a file apart without reading it: device, inode, change time in seconds and nanoseconds, size.
type Stamp = (u64, u64, i64, i64, u64);

fn look(path: &Path, node: Option<&str>, mut known: Known, why: Why) -> (Known, Option<Update>) {
    let stamp = path.metadata().ok().map(|m| (m.dev(), m.ino(), m.ctime(), m.ctime_nsec(), m.size()));
    let is_due = match why {
        Why::Asked | Why::Written => true,
        Why::Moved => stamp != known.read,
        Why::Looked => stamp != known.read && stamp == known.seen,
    };
    known.seen = stamp;
    if !is_due {
        return (known, None);
    }
    // Stamped before it is read: a change in between is found by the next look.
    known.read = stamp;
    let content = read(path);
    let mut hasher = DefaultHasher::new();
    content.as_ref().map_err(ToString::to_string).hash(&mut hasher);
    let is_new = known.content.replace(hasher.finish()) != Some(hasher.finish());
    let parsed = || content.and_then(|bytes| parse(path, &bytes, node)).map_err(SourceError::from);
    let update = (is_new || why == Why::Asked).then(parsed);
    (known, update)
}

/// The directory of the file. It is watched, not the file, as replacing the file by a rename is the usual way to change it.
struct Directory {
    path: PathBuf,
    file: OsString,
    events: Option<EventStream<Vec<u8>>>,
    watch: Option<WatchDescriptor>,
}

impl Directory {
    fn of(file: &Path) -> Self {
        let path = file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let events = Inotify::init().and_then(|inotify| inotify.into_event_stream(vec![0; 4096]));
        let events =
            events.inspect_err(|error| warn!(%error, "without inotify, changes of the services file are found late"));
        let file = file.file_name().unwrap_or_default().to_owned();
        let mut directory = Self { path: path.to_owned(), file, events: events.ok(), watch: None };
        directory.follow();
        directory
    }

    /// Watches the directory that is at the path now. Costs nothing when that is the same one.
    fn follow(&mut self) {
        let Some(mut watches) = self.events.as_ref().map(EventStream::watches) else { return };
        // When this fails the directory is gone, and so is the file: looks find that.
        let Ok(watch) = watches.add(&self.path, WatchMask::CLOSE_WRITE | WatchMask::MOVED_TO) else { return };
        if let Some(old) = self.watch.replace(watch.clone()).filter(|old| *old != watch) {
            // It fails for a directory that was removed, whose watch went with it.
            let _ = watches.remove(old);
        }
    }

    /// Waits until something in the directory changes that may concern the file.
    async fn change(&mut self) -> Why {
        let Some(events) = &mut self.events else { return future::pending().await };
        loop {
            match events.next().await {
                Some(Ok(event)) if event.name.as_ref() == Some(&self.file) => return Why::Written,
                Some(Ok(event)) if event.mask.contains(EventMask::MOVED_TO) => return Why::Moved,
                // The kernel's queue was too short.
                Some(Ok(event)) if event.mask.contains(EventMask::Q_OVERFLOW) => return Why::Written,
                Some(Ok(_)) => {}
                Some(Err(_)) | None => {
                    self.events = None;
                    return Why::Written;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, File},
        io::Write as _,
        os::unix::fs::symlink,
    };

    use tempfile::TempDir;

    use super::*;

    /// Longer than anything here may take, shorter than anybody's patience.
    const SOON: Duration = Duration::from_secs(10);

    /// A watch over `path` inside a directory that goes with it.
    struct Lab {
        directory: TempDir,
        reload: mpsc::Sender<()>,
        updates: mpsc::Receiver<Update>,
    }

    impl Lab {
        /// Lays the directory out, then starts to watch the file in it.
        fn new(file: &str, lay_out: impl FnOnce(&Path)) -> Self {
            let directory = tempfile::tempdir().unwrap();
            lay_out(directory.path());
            let (reload, requests) = mpsc::channel(1);
            let (sender, updates) = mpsc::channel(1);
            tokio::spawn(watch(directory.path().join(file), None, requests, sender));
            Self { directory, reload, updates }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.directory.path().join(name)
        }

        /// The next update has a service of this name.
        async fn yields(&mut self, name: &str) {
            let loaded = self.next().await.unwrap();
            assert_eq!(loaded.desired.services().keys().map(|key| &*key.name).collect::<Vec<_>>(), [name]);
        }

        /// The next update is an error that says this.
        async fn fails(&mut self, text: &str) {
            let error = self.next().await.unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }

        async fn next(&mut self) -> Update {
            time::timeout(SOON, self.updates.recv()).await.expect("no update").unwrap()
        }

        /// No update comes for three looks.
        async fn is_quiet(&mut self) {
            time::timeout(LOOK * 3, self.updates.recv()).await.expect_err("an update");
        }
    }

    fn content(name: &str) -> String {
        format!(
            "services: [{{ name: {name}, addresses: [10.0.0.1], ports: [{{ port: 80 }}], backends: [10.1.0.1] }}]\n"
        )
    }

    /// Replaces a file in one step.
    fn replace(path: &Path, name: &str) {
        let new = path.with_extension("new");
        fs::write(&new, content(name)).unwrap();
        fs::rename(new, path).unwrap();
    }

    fn with_one(directory: &Path) {
        fs::write(directory.join("s.yaml"), content("one")).unwrap();
    }

    #[tokio::test]
    async fn a_file_renamed_into_place() {
        let mut lab = Lab::new("s.yaml", with_one);
        lab.yields("one").await;
        replace(&lab.path("s.yaml"), "two");
        lab.yields("two").await;
        lab.is_quiet().await;
    }

    #[tokio::test]
    async fn a_file_written_in_place_is_read_when_it_is_closed() {
        let mut lab = Lab::new("s.yaml", with_one);
        lab.yields("one").await;
        let new = content("two");
        let (first, second) = new.split_at(new.len() / 2);
        let mut file = File::create(lab.path("s.yaml")).unwrap();
        file.write_all(first.as_bytes()).unwrap();
        time::sleep(LOOK / 5).await;
        file.write_all(second.as_bytes()).unwrap();
        drop(file);
        lab.yields("two").await;
    }

    #[tokio::test]
    async fn a_broken_file_is_told_and_so_is_the_repair() {
        let mut lab = Lab::new("s.yaml", with_one);
        lab.yields("one").await;
        fs::write(lab.path("s.yaml"), "services: [{}]").unwrap();
        lab.fails("s.yaml:1:12: services[0].name: missing").await;
        fs::write(lab.path("s.yaml"), content("one")).unwrap();
        lab.yields("one").await;
    }

    #[tokio::test]
    async fn a_file_that_goes_and_comes_back() {
        let mut lab = Lab::new("s.yaml", |_| ());
        lab.fails("No such file").await;
        with_one(lab.directory.path());
        lab.yields("one").await;
        fs::remove_file(lab.path("s.yaml")).unwrap();
        lab.fails("No such file").await;
        lab.is_quiet().await;
        replace(&lab.path("s.yaml"), "one");
        lab.yields("one").await;
    }

    #[tokio::test]
    async fn a_directory_that_goes_and_comes_back() {
        let mut lab = Lab::new("etc/s.yaml", |directory| {
            fs::create_dir(directory.join("etc")).unwrap();
            with_one(&directory.join("etc"));
        });
        lab.yields("one").await;
        fs::remove_dir_all(lab.path("etc")).unwrap();
        lab.fails("No such file").await;
        fs::create_dir(lab.path("etc")).unwrap();
        replace(&lab.path("etc/s.yaml"), "two");
        lab.yields("two").await;
        // The new directory is watched, not the old one: this takes no two looks.
        time::sleep(LOOK * 2).await;
        replace(&lab.path("etc/s.yaml"), "three");
        time::timeout(LOOK, lab.yields("three")).await.unwrap();
    }

    #[tokio::test]
    async fn a_config_map_is_swapped() {
        let mut lab = Lab::new("s.yaml", |directory| {
            for name in ["one", "two"] {
                fs::create_dir(directory.join(name)).unwrap();
                fs::write(directory.join(name).join("s.yaml"), content(name)).unwrap();
            }
            symlink("one", directory.join("..data")).unwrap();
            symlink("..data/s.yaml", directory.join("s.yaml")).unwrap();
        });
        lab.yields("one").await;
        symlink("two", lab.path("..data_tmp")).unwrap();
        fs::rename(lab.path("..data_tmp"), lab.path("..data")).unwrap();
        lab.yields("two").await;
    }

    #[tokio::test]
    async fn a_link_whose_target_changes_elsewhere() {
        let mut lab = Lab::new("s.yaml", |directory| {
            fs::create_dir(directory.join("elsewhere")).unwrap();
            with_one(&directory.join("elsewhere"));
            symlink("elsewhere/s.yaml", directory.join("s.yaml")).unwrap();
        });
        lab.yields("one").await;
        fs::write(lab.path("elsewhere/s.yaml"), content("two")).unwrap();
        lab.yields("two").await;
    }

    #[tokio::test]
    async fn the_same_content_again_is_no_news_unless_asked_for() {
        let mut lab = Lab::new("s.yaml", with_one);
        lab.yields("one").await;
        replace(&lab.path("s.yaml"), "one");
        with_one(lab.directory.path());
        lab.is_quiet().await;
        lab.reload.send(()).await.unwrap();
        lab.yields("one").await;
    }
}

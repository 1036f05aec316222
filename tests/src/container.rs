//! The container of `deploy/kubernetes`, as a runtime makes one of its manifest: the image that the `Dockerfile` makes, read-only /sys and
//! /proc/sys, the volumes, and no more capabilities than are asked for.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use k8s_openapi::api::{apps::v1::DaemonSet, core::v1};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::Value;
use tempfile::{NamedTempFile, TempDir};

use crate::{agent::binary, netns::NetNs};

/// Makes the root of a container at `$1`, and becomes its process there. What is mounted goes with it.
const RUNTIME: &str = r#"
set -e
root=$1 volumes=$2 capabilities=$3; shift 3
mount -t tmpfs container "$root"
cd "$root"
mkdir -p proc sys run/wharf host/proc/sys/net var usr/local/bin
ln -s /run var/run
touch usr/local/bin/wharf
mount --bind "$WHARF" usr/local/bin/wharf
cp "$(command -v setpriv)" usr/local/bin/
ldd usr/local/bin/wharf usr/local/bin/setpriv | grep -o '/[^ ]*' | grep -v : | sort -u | xargs cp --parents --dereference -t .
mount --bind /proc proc
mount --bind /proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount --bind /sys sys
mount -o remount,bind,ro sys
for volume in $volumes; do
    IFS=: read -r from to mode <<END
$volume
END
    mkdir -p "$root$to"
    mount --rbind "$from" "$root$to"
    if [ "$mode" = ro ]; then mount -o remount,bind,ro "$root$to"; fi
done
mount -o remount,ro "$root"
exec chroot . /usr/local/bin/setpriv --pdeathsig=KILL --no-new-privs --clear-groups --inh-caps=-all \
    --bounding-set="$capabilities" /usr/local/bin/wharf "$@"
"#;

/// What the container has of the machine.
#[derive(Debug)]
pub struct Pod {
    directory: TempDir,
    daemon_set: DaemonSet,
}

/// A container; killed when this is dropped.
#[derive(Debug)]
pub struct Container {
    process: Child,
    log: NamedTempFile,
}

/// The objects of the manifest, as they are written.
pub fn manifest() -> Vec<Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kubernetes/wharf.yaml");
    let text = fs::read_to_string(path).expect("it is there");
    serde_saphyr::from_multiple(&text).expect("it is YAML")
}

/// The objects of a kind.
pub fn of_kind<T: serde::de::DeserializeOwned>(kind: &str) -> T {
    let object = manifest().into_iter().find(|object| object["kind"] == kind).expect("there is one");
    serde_json::from_value(object).expect("it is what it says")
}

impl Pod {
    /// On a machine with a BPF file system of its own, and this service account.
    pub fn new(ca: &str) -> Self {
        let pod = Self {
            directory: tempfile::tempdir().expect("there is room for temporary files"),
            daemon_set: of_kind("DaemonSet"),
        };
        for name in ["root", "bpf", "run", "account"] {
            fs::create_dir(pod.path(name)).expect("the directory is ours");
        }
        mount(Some("bpf"), &pod.path("bpf"), Some("bpf"), MsFlags::empty(), Some("mode=0700")).expect("root may mount");
        for (name, content) in [("ca.crt", ca), ("..token", "secret"), ("namespace", "kube-system")] {
            fs::write(pod.path("account").join(name), content).expect("the directory is ours");
        }
        symlink("..token", pod.path("account/token")).expect("the directory is ours");
        pod
    }

    /// A directory or file of the machine.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Where the command line tool reaches the agent from outside.
    pub fn admin_socket(&self) -> PathBuf {
        self.path("run/admin.sock")
    }

    /// The first container of the manifest.
    pub fn container(&self) -> &v1::Container {
        let pod = self.daemon_set.spec.as_ref().and_then(|spec| spec.template.spec.as_ref());
        pod.and_then(|pod| pod.containers.first()).expect("there is one")
    }

    /// The volumes, each as what is mounted, where, and how; without those that are left out by name.
    fn volumes(&self, without: &[&str]) -> Vec<String> {
        let pod = self.daemon_set.spec.as_ref().and_then(|spec| spec.template.spec.as_ref());
        let volumes = pod.and_then(|pod| pod.volumes.as_ref()).expect("there are some");
        let mounts = self.container().volume_mounts.iter().flatten();
        let mounts = mounts.filter(|mount| !without.contains(&mount.name.as_str())).map(|mount| {
            let volume = volumes.iter().find(|volume| volume.name == mount.name).expect("each mount has a volume");
            let from = match &*volume.host_path.as_ref().expect("all are the node's").path {
                "/sys/fs/bpf" => self.path("bpf"),
                "/run/wharf" => self.path("run"),
                path => path.into(),
            };
            let mode = if mount.read_only == Some(true) { "ro" } else { "rw" };
            format!("{}:{}:{mode}", from.display(), mount.mount_path)
        });
        let account = format!("{}:/run/secrets/kubernetes.io/serviceaccount:ro", self.path("account").display());
        mounts.chain([account]).collect()
    }

    /// Runs the container on a node that is called so, for this API server; with more arguments, and without some volumes.
    pub fn run(&self, namespace: &NetNs, node: &str, server: &str, more: &[&str], without: &[&str]) -> Container {
        let container = self.container();
        let arguments = container.args.iter().flatten().map(|argument| {
            if argument.starts_with("--master=") {
                format!("--master={server}")
            } else {
                argument.replace("$(NODE_NAME)", node)
            }
        });
        let security = container.security_context.as_ref().expect("there is one");
        let capabilities = security.capabilities.as_ref().expect("some are asked for");
        assert_eq!(capabilities.drop.as_deref(), Some(&["ALL".to_owned()][..]));
        let added = capabilities.add.iter().flatten().map(|name| format!(",+{}", name.to_lowercase()));
        let log = NamedTempFile::new().expect("there is room for temporary files");
        let output = log.reopen().expect("there are descriptors left");
        let mut command = namespace.command("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", RUNTIME, "container"]);
        command
            .arg(self.path("root"))
            .arg(self.volumes(without).join(" "))
            .arg(format!("-all{}", added.collect::<String>()));
        command.args(arguments).args(more);
        command
            .env_clear()
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .env("WHARF", binary());
        command.env("KUBERNETES_SERVICE_HOST", "10.96.0.1").env("KUBERNETES_SERVICE_PORT", "443");
        command.stdin(Stdio::null()).stdout(output.try_clone().expect("there are descriptors left")).stderr(output);
        Container { process: command.spawn().expect("it can be run"), log }
    }

    /// What `wharf cleanup` says there, run by the node's own root.
    pub fn cleanup(&self, namespace: &NetNs) -> bool {
        let mut command: Command = namespace.command(binary());
        command.args(["cleanup", "--admin"]).arg(self.admin_socket()).arg("--bpffs").arg(self.path("bpf/wharf"));
        command.output().expect("it can be run").status.success()
    }
}

impl Container {
    /// The process in it.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// What it said.
    pub fn log(&self) -> String {
        fs::read_to_string(self.log.path()).expect("it goes with `self`")
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<i32> {
        self.process.try_wait().expect("it is our child").map(|status| status.code().unwrap_or(-1))
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // Both fail if it has ended.
        let _ = self.process.kill();
        let _ = self.process.wait();
        if std::thread::panicking() {
            eprintln!("the container said:\n{}", self.log());
        }
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        umount2(&self.path("bpf"), MntFlags::MNT_DETACH).expect("it is mounted");
    }
}

//! `wharf cleanup`: takes away all that agents left.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context as _;

use super::print;
use crate::{admin, cleanup, dataplane::kernel::DEFAULT_PINS};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Where it is pinned
    #[arg(long, value_name = "DIRECTORY", default_value = DEFAULT_PINS)]
    bpffs: PathBuf,
    /// Where the agent was reached: what it changed on the host is on record there
    #[arg(long, value_name = "PATH", default_value = admin::DEFAULT_SOCKET)]
    admin: PathBuf,
}

pub(super) fn run(Args { bpffs, admin }: &Args) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("the event loop could not be set up")?;
    let record = cleanup::record(admin)?;
    let is_on_record = record.exists();
    let had_anything = runtime.block_on(async {
        // Held until all is gone, so that no agent starts meanwhile; removed then.
        let _server = admin::server::Server::bind(admin).await?;
        cleanup::expect_pins(bpffs, admin, None)?;
        anyhow::Ok(cleanup::clean_up(bpffs, admin).await?)
    })?;
    match (had_anything, is_on_record) {
        (false, _) => print("there was nothing of wharf here\n")?,
        (true, true) => print("nothing of wharf is left\n")?,
        (true, false) => print(&format!(
            "the programs and tables of wharf are gone; there is no {} that would say what was changed on this host: nothing was if the \
             agent ran with --keep-sysctls, and after one with another --admin it is put back by `wharf cleanup` with that\n",
            record.display()
        ))?,
    }
    Ok(ExitCode::SUCCESS)
}

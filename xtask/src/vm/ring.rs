//! What is run in each guest.

use std::{borrow::Cow, ffi::OsString, path::Path, time::Duration};

use anyhow::Result;

use super::{binaries::Binaries, job::Job, kernel::Unpacked};
use crate::place::workspace;

/// A program of tests.
struct Part {
    program: &'static str,
    /// The tests that are run each time; all that the program has if none is named.
    core: &'static [&'static str],
    /// Those that are run with `--all` alone.
    more: &'static [&'static str],
}

impl Part {
    const fn whole(program: &'static str) -> Self {
        Self { program, core: &[], more: &[] }
    }

    fn tests(&self, is_whole: bool) -> Vec<&'static str> {
        [self.core, if is_whole { self.more } else { &[] }].concat()
    }
}

/// In a guest a verifier takes ten seconds instead of one for the programs, and almost every test loads them anew. So where there are
/// many tests, these are the ones in which kernels may differ: where programs sit and what is left of them, least recently used entries,
/// sockets, neighbours, routes. In the core, each of these has one or two.
const RING: [Part; 9] = [
    Part::whole("packets"),
    Part::whole("hostile"),
    Part {
        program: "attach",
        core: &[
            "each_mode_takes_the_place_that_it_names",
            "filters_of_an_agent_that_was_killed_are_replaced",
            "without_tcx_filters_of_clsact_do_the_same_and_go_with_the_qdisc_that_was_made_for_them",
        ],
        more: &[
            "by_xdp_nothing_is_sent_to_an_uplink_that_has_none",
            "where_the_driver_refuses_auto_takes_tc_and_says_why_and_native_fails",
        ],
    },
    Part {
        program: "tracking",
        core: &[
            "a_connection_is_established_by_who_has_seen_the_answer",
            "syns_force_out_no_established_flow",
            "the_oldest_flows_make_room_when_the_table_is_full",
        ],
        more: &["the_ports_of_the_hosts_own_sockets_stay_theirs", "what_is_idle_for_longer_than_its_timeout_is_over"],
    },
    Part {
        program: "flows",
        core: &["connections_follow_a_route", "unknown_neighbours_are_found"],
        more: &["a_removed_backend_gets_no_new_connections_and_the_others_keep_theirs", "round_robin_takes_turns"],
    },
    Part {
        program: "lifecycle",
        core: &["traffic_goes_on_without_the_agent", "with_keep_off_or_cleaned_up_nothing_is_left"],
        more: &[
            "an_agent_takes_over_in_another_mode",
            "ports_of_bonds_are_made_to_forward",
            "segments_are_put_together_behind_native_xdp_and_nothing_is_changed_elsewhere",
            "vlan_devices_that_come_later_are_made_to_forward_too",
        ],
    },
    // On a machine where nobody may look at process 1, this is the only place where it is run.
    Part {
        program: "privileges",
        core: &["what_was_run_by_ip_netns_exec_removes_its_pins_without_the_privilege_to_look_for_them"],
        more: &[],
    },
    Part {
        program: "sockets",
        core: &[
            "no_client_of_udp_stays_on_a_dead_backend_while_all_are_replaced",
            "processes_reach_services_by_every_address_and_every_kind_of_socket",
        ],
        more: &["a_udp_socket_may_be_connected_elsewhere", "what_is_a_node_port_is_no_port_of_anybody_else"],
    },
    Part {
        program: "nodes",
        core: &["tcp_connections_stay_where_they_are_when_endpoints_change"],
        more: &["a_process_of_the_node_is_balanced_by_what_it_sends"],
    },
];

/// What the programs of tests are told: that things may take twenty times longer than on the machine itself, as they do where that
/// is busy; to make few hostile packets; to run more tests at once than there are processors, since they sleep at times; and that the
/// machine is theirs.
const SETTINGS: [(&str, &str); 4] =
    [("WHARF_SLOWNESS", "20"), ("WHARF_PACKETS", "1000"), ("RUST_TEST_THREADS", "4"), ("WHARF_OWN_MACHINE", "1")];

/// How long one program of tests may take.
const LIMIT: Duration = Duration::from_secs(900);

/// The program of tests that is run in a guest of its own, where systemd is the first process.
pub(super) const UNIT: &str = "unit";

/// The job of a guest with this kernel: the core of the ring, or the whole, or one program of tests with its
/// arguments.
pub(super) fn job(kernel: &Unpacked, binaries: &Binaries, program: &[OsString], is_whole: bool) -> Result<Job> {
    let is_unit = program.first().is_some_and(|program| program == UNIT);
    let mut job = if is_unit { Job::by_systemd() } else { Job::as_first() };
    settle(&mut job, kernel, binaries);
    if let [program, args @ ..] = program {
        let binary = text(binaries.test(program)?);
        let args: Vec<_> = args.iter().map(|arg| arg.to_string_lossy()).collect();
        let words: Vec<_> = [&*binary].into_iter().chain(args.iter().map(|arg| &**arg)).collect();
        job.part(&program.to_string_lossy(), LIMIT, &words);
    } else {
        for part in RING {
            binaries.expect(part.program, &part.tests(true))?;
            let binary = text(binaries.test(part.program.as_ref())?);
            job.part(part.program, LIMIT, &[&[&*binary, "--exact"], &*part.tests(is_whole)].concat());
        }
    }
    Ok(job)
}

/// Makes a guest a place where programs of tests find what they need.
fn settle(job: &mut Job, kernel: &Unpacked, binaries: &Binaries) {
    job.link("/lib/modules/$(uname -r)", &kernel.modules);
    job.set("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    job.set("WHARF_BIN", &text(&binaries.wharf));
    for (name, value) in SETTINGS {
        job.set(name, value);
    }
    // As cargo does.
    job.enter(&workspace().join("tests"));
}

fn text(path: &Path) -> Cow<'_, str> {
    path.as_os_str().to_string_lossy()
}

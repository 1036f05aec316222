//! How services come into force: those of a file all at once or not at all, those of a cluster each by itself where they don't fit
//! together.

use std::{
    collections::BTreeMap,
    fmt, io,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use tokio::task::spawn_blocking;
use tracing::{error, info, warn};

use super::{Agent, describe};
use crate::{
    dataplane::{DataplaneError, grace, tables::Wait},
    model::{Desired, Service, ServiceName},
    policy::{Decision, Node},
    source::{Loaded, NodeObject},
};

/// How long the kernel may refuse changes until the agent is not well: kube-proxy's patience, too (Kubernetes,
/// `cmd/kube-proxy/app/server.go`: twice `syncPeriod`).
pub(super) const STUCK: Duration = Duration::from_secs(60);

/// What the source wants and is not in force.
pub(super) struct Waiting {
    desired: Arc<Desired>,
    lack: Lack,
}

/// Why not all is in force.
enum Lack {
    /// Nothing has changed, for this reason.
    OfAll(String),
    /// All is in force but these services, each for its reason.
    OfSome {
        services: BTreeMap<Arc<str>, String>,
        /// Whether others have changed since they were tried, so that there may be room.
        is_stale: bool,
    },
}

impl fmt::Display for Lack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OfAll(reason) => reason.fmt(f),
            Self::OfSome { services, .. } => {
                let Some((first, reason)) = services.first_key_value() else { return Ok(()) };
                first.fmt(f)?;
                if services.len() > 1 {
                    write!(f, " and {} others", services.len() - 1)?;
                }
                write!(f, ": {reason}")
            }
        }
    }
}

impl Agent {
    /// Puts in force what the source says now.
    pub(super) fn apply(&mut self, loaded: &Loaded) {
        loaded.warnings.iter().for_each(|warning| warn!("{warning}"));
        self.metrics.note_changes(&loaded.changes);
        match &loaded.troubles {
            Some(troubles) => self.refuse(troubles.clone()),
            None => self.refused = None,
        }
        self.tell_lacking(&loaded.desired);
        self.know_node(&loaded.node);
        self.put_in_force(&loaded.desired);
    }

    /// Says which services want what an older one has, as far as they did not before.
    pub(super) fn tell_lacking(&self, desired: &Desired) {
        let waiting = self.waiting.as_ref().map(|waiting| &waiting.desired);
        let before = waiting.or_else(|| self.desired()).cloned().unwrap_or_default();
        desired.lacking_since(&before).for_each(|it| warn!("{it}"));
    }

    /// Tries again what was refused by the kernel, or did not fit.
    pub(super) fn apply_waiting(&mut self) {
        if self.outgrown.is_some() {
            self.settle_again();
        } else if let Some(Waiting { lack, .. }) = &self.waiting
            && !matches!(lack, Lack::OfSome { is_stale: false, .. })
        {
            self.try_again();
        }
    }

    fn try_again(&mut self) {
        if let Some(Waiting { desired, lack }) = &mut self.waiting {
            // Of single services it is not known any more that they don't fit.
            *lack = Lack::OfAll(lack.to_string());
            let desired = Arc::clone(desired);
            self.put_in_force(&desired);
        }
    }

    /// Enforces what the source wants, and does what follows from that. What can't be in force now is kept, to be tried again.
    fn put_in_force(&mut self, desired: &Arc<Desired>) {
        let begin = Instant::now();
        let lack = match self.enforce_what_fits(desired) {
            Ok((changes, lack)) => {
                self.note_applied(begin);
                self.revision += 1;
                info!(changes, microseconds = begin.elapsed().as_micros(), "services applied");
                lack
            }
            Err(error) => Some(Lack::OfAll(describe(&error))),
        };
        self.wait_for(desired, lack);
        self.reclaim();
        self.choose_addresses();
    }

    /// Keeps what is not in force, and says so where that is news.
    fn wait_for(&mut self, desired: &Arc<Desired>, lack: Option<Lack>) {
        let desired = Arc::clone(desired);
        let before = self.waiting.take().map(|waiting| waiting.lack.to_string());
        self.waiting = lack.map(|lack| Waiting { desired, lack });
        match (before, self.waiting.as_ref().map(|waiting| waiting.lack.to_string())) {
            (Some(_), None) => info!("what was refused before is in force now"),
            (before, Some(now)) if before.as_ref() != Some(&now) => error!("not all services are in force: {now}"),
            _ => {}
        }
    }

    /// Enforces what is wanted at the start. What a former agent served goes on where that does not fit, as it would under that one.
    pub(super) fn enforce_first(&mut self, desired: &Arc<Desired>, has_former: bool) -> Result<usize, DataplaneError> {
        match self.enforce(desired) {
            Err(error @ DataplaneError::Full { .. }) if has_former => {
                self.wait_for(desired, Some(Lack::OfAll(describe(&error))));
                Ok(0)
            }
            enforced => enforced,
        }
    }

    /// What is wanted is in force now, which took since `begin`.
    pub(super) fn note_applied(&mut self, begin: Instant) {
        self.applied = SystemTime::now();
        self.metrics.note_sync(begin.elapsed());
    }

    /// Decides anew what is to be served, by the node as it is now.
    pub(super) fn settle(&mut self, node: Node) {
        self.node = Arc::new(node);
        self.settle_again();
    }

    fn settle_again(&mut self) {
        self.try_again();
        let Some(desired) = self.desired().cloned() else { return };
        match self.enforce(&desired) {
            Ok(changes) if self.outgrown.is_none() => {
                info!(changes, "services applied to the node's addresses and pods as they are now");
            }
            Err(error) if self.waiting.is_none() => self.wait_for(&desired, Some(Lack::OfAll(describe(&error)))),
            _known => {}
        }
        self.reclaim();
    }

    /// Makes the tables say what is desired, or nothing of it; where services change each by itself, as much of it as fits.
    fn enforce_what_fits(&mut self, desired: &Arc<Desired>) -> Result<(usize, Option<Lack>), DataplaneError> {
        let is_known_not_to_fit =
            self.waiting.as_ref().is_some_and(|waiting| matches!(waiting.lack, Lack::OfSome { .. }));
        if !is_known_not_to_fit {
            match self.enforce(desired) {
                Err(DataplaneError::Full { .. }) if self.options.source.has_independent_services() => {}
                enforced => return enforced.map(|changes| (changes, None)),
            }
        }
        self.enforce_one_by_one(desired)
    }

    /// Makes the tables say what is desired of the services that fit. Those come first that take the least: whoever goes or shrinks makes
    /// room. The others stay as they were.
    fn enforce_one_by_one(&mut self, desired: &Arc<Desired>) -> Result<(usize, Option<Lack>), DataplaneError> {
        let mut admitted = match self.desired() {
            Some(in_force) => Desired::clone(in_force),
            // What a former agent served is not given up for others.
            None => desired.filter(|name| self.tables.applied().services.contains_key(name)),
        };
        let mut former = None;
        let mut changes = match self.enforce(&Arc::new(admitted.clone())) {
            // One of these has outgrown the tables since. So none has more, for now, than it had.
            Err(DataplaneError::Full { .. }) if self.in_force.is_none() => {
                let former = former.insert(Arc::clone(self.tables.applied()));
                admitted = admitted.with_endpoints(|name, address| {
                    former.services.get(name).is_some_and(|serving| serving.has_backend(address))
                });
                self.enforce(&Arc::new(admitted.clone()))?
            }
            enforced => enforced?,
        };
        // Whose endpoints are others now has a right to as many as it had.
        let size = |name: &ServiceName, service: &Service| {
            let serving = former.as_ref().and_then(|former| former.services.get(name));
            serving.map_or(service.endpoints.len(), |serving| serving.backends.len())
        };
        let (before, known) = match &self.waiting {
            Some(Waiting { desired, lack: Lack::OfSome { services, .. } }) => (Arc::clone(desired), services.clone()),
            _ => Default::default(),
        };
        let (mut services, mut has_changed_since) = (BTreeMap::new(), false);
        for name in admitted.names_by_growth(desired, size) {
            if let Some(reason) = known.get(&name).filter(|_| before.says_the_same(desired, &name)) {
                services.insert(name, reason.clone());
                continue;
            }
            let mut next = admitted.clone();
            next.copy(&name, desired);
            match self.enforce(&Arc::new(next.clone())) {
                Ok(more) => {
                    changes += more;
                    // Not only endpoints take room: there may be some again for one that was refused before.
                    has_changed_since |= more > 0 && !services.is_empty();
                    admitted = next;
                }
                Err(error @ DataplaneError::Full { .. }) => drop(services.insert(name, describe(&error))),
                Err(error) => return Err(error),
            }
        }
        let was_stale = matches!(&self.waiting, Some(Waiting { lack: Lack::OfSome { is_stale: true, .. }, .. }));
        let is_stale = was_stale || has_changed_since || changes > 0 && !known.is_empty();
        Ok((changes, (!services.is_empty()).then_some(Lack::OfSome { services, is_stale })))
    }

    /// Makes the tables say what is desired, on the node as it is now. Where that has outgrown them, with more addresses or another zone,
    /// services go on to change on the node as it was.
    pub(super) fn enforce(&mut self, desired: &Arc<Desired>) -> Result<usize, DataplaneError> {
        let before = self.in_force.clone().unwrap_or_default();
        match self.enforce_decision(before.next(desired, &self.node)) {
            Err(error @ DataplaneError::Full { .. }) if self.in_force.is_some() && *before.node() != self.node => {
                let changes = self.enforce_decision(before.next(desired, before.node()))?;
                self.note_outgrown(Some(describe(&error)));
                Ok(changes)
            }
            enforced => {
                if enforced.is_ok() {
                    self.note_outgrown(None);
                }
                enforced
            }
        }
    }

    /// Notes why services can't be in force on the node as it is now, and says so where that is news.
    fn note_outgrown(&mut self, why: Option<String>) {
        match (&self.outgrown, &why) {
            (before, Some(now)) if before.as_ref() != Some(now) => {
                error!("services are in force on this node as it was, and not as it is now: {now}");
            }
            (Some(_), None) => info!("services are in force on this node as it is now"),
            _ => {}
        }
        self.outgrown = why;
    }

    /// Makes the tables say what was decided. This is the one place where services are applied.
    fn enforce_decision(&mut self, decision: Decision) -> Result<usize, DataplaneError> {
        let changes = self.tables.apply(decision.decided()).inspect_err(|error| {
            if !matches!(error, DataplaneError::Full { .. }) {
                self.stuck.get_or_insert_with(Instant::now);
            }
        })?;
        self.in_force = Some(decision);
        self.stuck = None;
        // Where room was short, what had gone before was freed on the way.
        self.end_sockets();
        Ok(changes)
    }

    /// Takes what the source says of this node.
    pub(super) fn know_node(&mut self, object: &NodeObject) {
        if self.node_object != *object {
            self.node_object = object.clone();
            self.node = Arc::new(Node { zone: object.zone.clone(), ..Node::clone(&self.node) });
        }
    }

    /// Begins to free what is no longer used. That takes some milliseconds, and what has changed is in force already.
    pub(super) fn reclaim(&mut self) {
        if let Some(wait) = self.tables.begin_wait() {
            self.reclaiming = Some(spawn_blocking(move || (wait, grace::wait())));
        }
    }

    /// Frees what nobody holds any more, and ends the sockets of what has gone.
    pub(super) fn reclaimed(&mut self, (wait, waited): (Wait, io::Result<()>)) {
        match waited {
            Ok(()) => {
                self.tables.free(wait);
                self.reclaim();
            }
            Err(error) => {
                error!(%error, "table entries that are no longer used could not be freed");
                self.tables.give_up(wait);
            }
        }
        self.end_sockets();
    }

    /// How it is with the services, in a few words.
    pub(super) fn summary(&self) -> String {
        let count = self.services().count();
        self.error().map_or_else(
            || format!("balancing; services: {count}"),
            |error| format!("balancing; services: {count}, as they were before: {error}"),
        )
    }

    /// Why not all is in force that is wanted.
    pub(super) fn error(&self) -> Option<String> {
        let lacking = || self.waiting.as_ref().map(|waiting| waiting.lack.to_string());
        self.refused.clone().or_else(lacking).or_else(|| self.outgrown.clone())
    }

    /// Keeps the last good state, and says why.
    pub(super) fn refuse(&mut self, text: String) {
        if self.refused.as_ref() != Some(&text) {
            error!("the services stay as they were: {text}");
        }
        self.refused = Some(text);
    }

    /// What is in force, as its source has it.
    pub(super) fn desired(&self) -> Option<&Arc<Desired>> {
        self.in_force.as_ref().map(Decision::desired)
    }

    /// The services that are in force.
    pub(super) fn services(&self) -> impl Iterator<Item = (&ServiceName, &Arc<Service>)> {
        self.desired().into_iter().flat_map(|desired| desired.services())
    }
}

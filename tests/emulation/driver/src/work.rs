//! Streams, events and graphs. Nothing runs before something waits for it, and then only what that depends on: where a
//! dependency was forgotten, what should have run has not. Of several dependencies now the first comes first, now the last.

use crate::memory::Memory;
use crate::stop;
use cudarc::driver::sys::CUresult;
use std::collections::{BTreeMap, HashSet};
use std::ffi::c_void;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

/// A launch, ready to run.
#[derive(Clone)]
pub struct Launch {
    pub kernel: String,
    pub grid: usize,
    pub threads: usize,
    pub shared_bytes: usize,
    /// In words, so that the struct is aligned.
    pub params: Arc<[u64]>,
}

/// What a stream does.
#[derive(Clone)]
pub enum Work {
    /// Comes to pass: an event, or what comes after several others.
    Mark,
    Launch(Launch),
    /// `count` times `value`, of so many bytes.
    Fill {
        at: u64,
        value: u32,
        width: usize,
        count: usize,
    },
    Copy {
        from: u64,
        to: u64,
        bytes: usize,
    },
    /// From memory of the host, as it was when it was asked for.
    Upload {
        from: Arc<[u8]>,
        to: u64,
    },
    Graph(Arc<[Template]>),
}

/// Work of a graph, with the earlier work that it comes after.
#[derive(Clone)]
pub struct Template {
    pub work: Work,
    pub after: Vec<usize>,
}

enum Stage {
    Waiting(Work, Vec<Arc<Node>>),
    Running,
    Done,
}

/// Work in a stream.
pub struct Node(Mutex<Stage>);

impl Node {
    fn stage(&self) -> MutexGuard<'_, Stage> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    pub fn is_done(&self) -> bool {
        matches!(*self.stage(), Stage::Done)
    }
}

#[derive(Default)]
pub struct Stream {
    pub last: Option<Arc<Node>>,
    /// It takes part in the order of the null stream.
    pub blocking: bool,
    /// The capture that it is part of, and what comes before the next work in it.
    pub capture: Option<(usize, Vec<usize>)>,
}

#[derive(Clone, Default)]
pub enum Recorded {
    #[default]
    Never,
    Stream(Arc<Node>),
    Captured(usize, Vec<usize>),
}

#[derive(Default)]
pub struct Event {
    pub recorded: Recorded,
    pub timing: bool,
}

/// A capture in progress.
pub struct Capture {
    pub origin: usize,
    pub thread: std::thread::ThreadId,
    pub templates: Vec<Template>,
}

/// A graph that can be launched, and its last launch.
pub struct Executable {
    pub templates: Arc<[Template]>,
    pub last: Option<Arc<Node>>,
}

/// A function of a module.
#[derive(Clone)]
pub struct Function {
    pub kernel: String,
    pub params_bytes: usize,
    pub shared_bytes: u32,
}

/// All that the driver holds. Handles are numbers.
#[derive(Default)]
pub struct State {
    pub initialised: bool,
    /// How often the primary context is held.
    pub retained: usize,
    /// What went wrong on the card: every call returns it from then on.
    pub broken: Option<CUresult>,
    pub memory: Memory,
    /// 0 is the null stream.
    pub streams: BTreeMap<usize, Stream>,
    pub events: BTreeMap<usize, Event>,
    pub captures: BTreeMap<usize, Capture>,
    pub graphs: BTreeMap<usize, Arc<[Template]>>,
    pub executables: BTreeMap<usize, Executable>,
    /// The file that a module turned out to be.
    pub modules: BTreeMap<usize, Option<&'static str>>,
    pub functions: BTreeMap<usize, Function>,
    handles: usize,
    /// Parity of the next choice among several dependencies.
    choices: usize,
}

static STATE: Mutex<Option<State>> = Mutex::new(None);
/// Some node is done.
static DONE: Condvar = Condvar::new();

/// The driver's state, locked.
pub struct Locked(MutexGuard<'static, Option<State>>);

pub fn lock() -> Locked {
    let mut state = STATE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    state.get_or_insert_with(|| {
        let null = Stream { blocking: true, ..Stream::default() };
        State { streams: BTreeMap::from([(0, null)]), ..State::default() }
    });
    Locked(state)
}

/// For a signal handler: `None` where someone holds it.
pub fn try_lock() -> Option<Locked> {
    STATE.try_lock().ok().filter(|state| state.is_some()).map(Locked)
}

impl std::ops::Deref for Locked {
    type Target = State;

    fn deref(&self) -> &State {
        self.0.as_ref().unwrap_or_else(|| stop("no state"))
    }
}

impl std::ops::DerefMut for Locked {
    fn deref_mut(&mut self) -> &mut State {
        self.0.as_mut().unwrap_or_else(|| stop("no state"))
    }
}

impl State {
    /// A handle that no other object has.
    pub fn handle(&mut self) -> usize {
        self.handles += 1;
        // Neither null nor one of the driver's own stream numbers.
        0x1000 + self.handles * 16
    }

    pub fn stream(&mut self, stream: usize) -> Result<&mut Stream, CUresult> {
        self.streams.get_mut(&stream).ok_or(CUresult::CUDA_ERROR_INVALID_HANDLE)
    }

    pub fn event(&mut self, event: usize) -> Result<&mut Event, CUresult> {
        self.events.get_mut(&event).ok_or(CUresult::CUDA_ERROR_INVALID_HANDLE)
    }

    /// Puts work at a stream's end, or into the graph that it is being captured into.
    pub fn push(&mut self, stream: usize, work: Work) -> Result<(), CUresult> {
        if let Some((capture, after)) = &self.stream(stream)?.capture {
            let (capture, after) = (*capture, after.clone());
            let Some(held) = self.captures.get_mut(&capture) else { stop("a capture that is gone") };
            held.templates.push(Template { work, after });
            let last = held.templates.len() - 1;
            self.stream(stream)?.capture = Some((capture, vec![last]));
            return Ok(());
        }
        self.append(stream, work, None);
        Ok(())
    }

    /// Puts work at a stream's end, after `also` too.
    pub fn append(&mut self, stream: usize, work: Work, also: Option<Arc<Node>>) -> Arc<Node> {
        let blocking = |stream: &Stream| stream.blocking.then(|| stream.last.clone()).flatten();
        let mut after: Vec<Arc<Node>> = self.streams[&stream].last.iter().cloned().collect();
        if stream == 0 {
            after.extend(
                self.streams.iter().filter(|(handle, _)| **handle != 0).filter_map(|(_, s)| blocking(s)),
            );
        } else if self.streams[&stream].blocking {
            after.extend(blocking(&self.streams[&0]));
        }
        after.extend(also);
        let node = Arc::new(Node(Mutex::new(Stage::Waiting(work, after))));
        if let Some(stream) = self.streams.get_mut(&stream) {
            stream.last = Some(node.clone());
        }
        node
    }

    /// A stream that is being captured can neither be waited for nor asked.
    pub fn check_not_captured(&mut self, stream: usize) -> Result<(), CUresult> {
        match self.stream(stream)?.capture {
            Some(_) => Err(CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED),
            None => Ok(()),
        }
    }

    /// What may not be done by a thread that captures.
    pub fn check_no_capture_here(&self) -> Result<(), CUresult> {
        let here = std::thread::current().id();
        match self.captures.values().any(|capture| capture.thread == here) {
            true => Err(CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED),
            false => Ok(()),
        }
    }

    /// All work that any stream holds.
    pub fn all_work(&self) -> Vec<Arc<Node>> {
        let graphs = self.executables.values().filter_map(|graph| graph.last.clone());
        self.streams.values().filter_map(|stream| stream.last.clone()).chain(graphs).collect()
    }

    /// The nodes to run or to wait for before `node`, and itself, in an order that its dependencies allow. Those to run are taken.
    fn take(&mut self, node: &Arc<Node>) -> Vec<(Arc<Node>, Option<Work>)> {
        // Depth first without recursion: a node is entered once, and left behind what it depends on.
        let mut order: Vec<(Arc<Node>, Option<Work>)> = Vec::new();
        let mut stack = vec![(node.clone(), false)];
        let mut seen: HashSet<*const Node> = HashSet::new();
        let mut taken: BTreeMap<*const Node, Work> = BTreeMap::new();
        while let Some((node, leaving)) = stack.pop() {
            let key = Arc::as_ptr(&node);
            if leaving {
                let work = taken.remove(&key);
                order.push((node, work));
                continue;
            }
            if !seen.insert(key) {
                continue;
            }
            let mut stage = node.stage();
            match std::mem::replace(&mut *stage, Stage::Running) {
                Stage::Waiting(work, mut after) => {
                    drop(stage);
                    taken.insert(key, work);
                    if after.len() > 1 {
                        self.choices += 1;
                        if self.choices.is_multiple_of(2) {
                            after.reverse();
                        }
                    }
                    stack.push((node, true));
                    stack.extend(after.into_iter().map(|node| (node, false)));
                }
                Stage::Running => {
                    drop(stage);
                    order.push((node, None));
                }
                Stage::Done => *stage = Stage::Done,
            }
        }
        order
    }
}

/// Runs all that `node` depends on, then `node`.
pub fn finish(node: &Arc<Node>) -> Result<(), CUresult> {
    // Who takes later waits for who took earlier, never the other way round.
    let order = lock().take(node);
    for (node, work) in order {
        match work {
            Some(work) => {
                let broken = lock().broken.is_some();
                let result = if broken { Ok(()) } else { run(&work) };
                let mut state = lock();
                if let Err(error) = result {
                    state.broken = Some(error);
                }
                *node.stage() = Stage::Done;
                DONE.notify_all();
            }
            None => {
                let mut state = lock();
                while !node.is_done() {
                    state = Locked(DONE.wait(state.0).unwrap_or_else(|poisoned| poisoned.into_inner()));
                }
            }
        }
    }
    lock().broken.map_or(Ok(()), Err)
}

/// Runs all that any stream holds.
pub fn finish_all() -> Result<(), CUresult> {
    let all = lock().all_work();
    all.iter().try_for_each(finish)
}

/// The order of a graph's work: as late as its dependencies allow.
fn order_of(templates: &[Template]) -> Vec<usize> {
    let mut order = Vec::new();
    let mut seen = vec![false; templates.len()];
    for end in (0..templates.len()).rev() {
        let mut stack = vec![(end, false)];
        while let Some((at, leaving)) = stack.pop() {
            if leaving {
                order.push(at);
            } else if !std::mem::replace(&mut seen[at], true) {
                stack.push((at, true));
                let mut after = templates[at].after.clone();
                if end.is_multiple_of(2) {
                    after.reverse();
                }
                stack.extend(after.into_iter().map(|at| (at, false)));
            }
        }
    }
    order
}

fn run(work: &Work) -> Result<(), CUresult> {
    match work {
        Work::Mark => {}
        Work::Launch(launch) => return crate::kernels::run(launch),
        &Work::Fill { at, value, width, count } => {
            let pattern = &value.to_le_bytes()[..width];
            for index in 0..count {
                // SAFETY: inside an allocation, as was checked when it was asked for; freeing waits for all work.
                unsafe { copy(pattern.as_ptr() as u64, at + (index * width) as u64, width) };
            }
        }
        // SAFETY: as above; of the host's side the caller answers.
        &Work::Copy { from, to, bytes } => unsafe { copy(from, to, bytes) },
        // SAFETY: as above.
        Work::Upload { from, to } => unsafe { copy(from.as_ptr() as u64, *to, from.len()) },
        Work::Graph(templates) => {
            for at in order_of(templates) {
                run(&templates[at].work)?;
            }
        }
    }
    Ok(())
}

/// Copies between memories of this process.
///
/// # Safety
/// Both stretches are there.
unsafe fn copy(from: u64, to: u64, bytes: usize) {
    // SAFETY: the caller's.
    unsafe { libc::memmove(to as *mut c_void, from as *const c_void, bytes) };
}

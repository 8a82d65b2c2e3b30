//! The forward's peak beyond inputs and outputs does not grow with T.

use dla::check::Recipe;
use dla::{Engine, cpu};
use peak_alloc::PeakAlloc;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

#[test]
fn forward_peak_does_not_grow_with_time() {
    // On one thread: how many of several take part, and so how many keep a chunk's scratch, is chance.
    rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap().install(on_one_thread);
}

fn on_one_thread() {
    let peak = |time: usize| {
        let case = Recipe { time, value_heads: 2, heads: 2, dk: 32, dv: 32, ..Recipe::default() }.draw(1);
        let problem = case.problem().unwrap();
        // Threads and what they keep are not the call's.
        drop(cpu::Engine.forward(&problem).unwrap());
        let before = ALLOCATOR.current_usage();
        ALLOCATOR.reset_peak_usage();
        let forward = cpu::Engine.forward(&problem).unwrap();
        let held = ALLOCATOR.current_usage() - before;
        let extra = ALLOCATOR.peak_usage() - before - held;
        assert!(!forward.o.is_empty());
        (extra, held)
    };
    let (short, held_short) = peak(512);
    let (long, held_long) = peak(8192);
    println!("beyond inputs and outputs: {short} bytes at T = 512, {long} at T = 8,192");
    assert!(held_long > 10 * held_short / 2);
    assert!(short > 0 && long <= short + short / 20, "{short} bytes at T = 512, {long} at T = 8,192");
}

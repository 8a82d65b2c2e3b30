//! Which states a backward over many windows keeps, and which it computes again: binomial checkpointing (Griewank and
//! Walther, Algorithm 799, "revolve"). With s places for states and at most r sweeps over any window, C(s + r, s) windows
//! can be reversed; none needs fewer sweeps.

/// What a walk over the windows from the last to the first consists of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Carry the state of place `from` (`None`: the initial one) over windows `first..last` into place `to`.
    Advance {
        /// Where the state before `first` is.
        from: Option<usize>,
        /// Where the state before `last` goes; another place than `from`.
        to: usize,
        /// First window.
        first: usize,
        /// One past the last window.
        last: usize,
    },
    /// Reverse one window, the state before it being in place `from` (`None`: the initial one), which is of no use after.
    Reverse {
        /// Where the state before the window is.
        from: Option<usize>,
        /// The window.
        window: usize,
    },
}

/// The binomial coefficient C(n, k), or the largest number where it is beyond it.
fn choose(n: usize, k: usize) -> usize {
    let k = k.min(n - k.min(n));
    (0..k).try_fold(1usize, |c, i| Some(c.checked_mul(n - i)? / (i + 1))).unwrap_or(usize::MAX)
}

/// Most sweeps over a window.
fn sweeps(windows: usize, places: usize) -> usize {
    (0..).find(|r| choose(places + r, places) >= windows).unwrap_or(0)
}

/// Windows that a walk advances over, in all.
pub fn cost(windows: usize, places: usize) -> usize {
    if windows < 2 {
        return 0;
    }
    let places = places.max(1);
    let r = sweeps(windows, places);
    r * windows - choose(places + r, places + 1)
}

/// Where a range of `windows` is cut: the state there is the next to be kept.
fn cut(windows: usize, places: usize) -> usize {
    let r = sweeps(windows, places);
    // What is before the cut may take one sweep less, what is behind it one place less; and neither so few windows that
    // it would take fewer sweeps still.
    let least = windows.saturating_sub(choose(places - 1 + r, places - 1)).max(1);
    let least = least.max(if r > 1 { choose(places + r - 2, places) } else { 1 });
    let most = choose(places + r - 1, places).min(windows - 1);
    least.min(most)
}

/// Walks over `windows` windows with `places` places for states, at least one where there are two windows or more.
pub fn walk<E>(windows: usize, places: usize, step: &mut impl FnMut(Step) -> Result<(), E>) -> Result<(), E> {
    let mut free: Vec<usize> = (0..places).rev().collect();
    range(0, windows, None, &mut free, step)
}

fn range<E>(
    first: usize,
    last: usize,
    from: Option<usize>,
    free: &mut Vec<usize>,
    step: &mut impl FnMut(Step) -> Result<(), E>,
) -> Result<(), E> {
    let mut last = last;
    while last > first {
        if last - first == 1 {
            return step(Step::Reverse { from, window: first });
        }
        let places = free.len();
        let Some(to) = free.pop() else { return Ok(()) };
        // With one place left every window is reached from `from` anew.
        let middle = if places == 1 { last - 1 } else { first + cut(last - first, places) };
        step(Step::Advance { from, to, first, last: middle })?;
        range(middle, last, Some(to), free, step)?;
        free.push(to);
        last = middle;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Walks, checks that every state is where it is said to be, and returns the windows advanced over.
    fn follow(windows: usize, places: usize) -> usize {
        let (mut held, mut next, mut advanced) = (vec![None; places], windows, 0);
        walk::<()>(windows, places, &mut |step| {
            let state = |from: Option<usize>| from.map_or(Some(0), |place: usize| held[place]);
            match step {
                Step::Advance { from, to, first, last } => {
                    assert!(state(from) == Some(first) && from != Some(to) && first < last);
                    held[to] = Some(last);
                    advanced += last - first;
                }
                Step::Reverse { from, window } => {
                    assert!(state(from) == Some(window) && window + 1 == next);
                    next = window;
                }
            }
            Ok(())
        })
        .unwrap();
        assert_eq!(next, 0, "{windows} windows, {places} places");
        advanced
    }

    #[test]
    fn every_window_is_reversed_at_the_least_cost() {
        // The least, by trying every cut.
        let mut least = vec![vec![0usize; 9]; 61];
        for windows in 2..=60 {
            least[windows][0] = usize::MAX / 2;
            for places in 1..=8 {
                least[windows][places] = (1..windows)
                    .map(|cut| cut + least[windows - cut][places - 1] + least[cut][places])
                    .min()
                    .unwrap();
            }
        }
        for windows in 0..=60 {
            for places in 1..=8 {
                assert_eq!(follow(windows, places), cost(windows, places), "{windows} {places}");
                assert_eq!(cost(windows, places), least[windows][places], "{windows} {places}");
            }
        }
        assert!(cost(4096, 8) < 6 * 4096 && follow(4096, 8) == cost(4096, 8));
    }
}

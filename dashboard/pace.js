/** How often things are done: not more often than is of use, and not while nobody looks. */

/**
 * Return a function that has `work` done soon, at most once in so many milliseconds, however
 * often it is called. While the page is hidden it waits.
 * @param {() => void | Promise<void>} work
 * @param {number} milliseconds
 * @param {AbortSignal} signal
 */
export function paced(work, milliseconds, signal) {
  let timer = 0;
  let last = 0;
  let isAsked = false;
  let isBusy = false;
  const start = async () => {
    timer = 0;
    if (signal.aborted || document.hidden || isBusy) return;
    isAsked = false;
    isBusy = true;
    last = Date.now();
    try {
      await work();
    } finally {
      isBusy = false;
      if (isAsked) arm();
    }
  };
  const arm = () => {
    if (timer || isBusy || signal.aborted) return;
    timer = setTimeout(start, Math.max(0, last + milliseconds - Date.now()));
  };
  document.addEventListener('visibilitychange', () => {
    if (!document.hidden && isAsked) arm();
  }, { signal });
  signal.addEventListener('abort', () => clearTimeout(timer));
  return () => {
    isAsked = true;
    arm();
  };
}

/**
 * Do something again and again while the page is seen, the first time at once.
 * @param {() => void} work
 * @param {number} milliseconds
 * @param {AbortSignal} signal
 */
export function repeat(work, milliseconds, signal) {
  work();
  const timer = setInterval(() => {
    if (!document.hidden) work();
  }, milliseconds);
  document.addEventListener('visibilitychange', () => {
    if (!document.hidden) work();
  }, { signal });
  signal.addEventListener('abort', () => clearInterval(timer));
}

/** Let the browser draw and hear before more is done. */
export function breathe() {
  return new Promise((resolve) => { setTimeout(resolve, 0); });
}

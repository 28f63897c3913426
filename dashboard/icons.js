/** Small drawings of 16 x 16, in the colour of the text around them. */

const NAMESPACE = 'http://www.w3.org/2000/svg';

/** Paths that are drawn as lines. */
const PATHS = {
  overview: 'M2.5 9.5h3v4h-3zM6.5 5.5h3v8h-3zM10.5 2.5h3v11h-3z',
  jobs: 'M5.5 4h8M5.5 8h8M5.5 12h8M2.5 4h.01M2.5 8h.01M2.5 12h.01',
  submit: 'M8 10.5v-8M4.8 5.5 8 2.3l3.2 3.2M2.5 10.5v3h11v-3',
  agents: 'M2.5 3h11v4h-11zM2.5 9h11v4h-11zM5 5h.01M5 11h.01',
  services: 'M8 1.8 13.8 5 8 8.2 2.2 5zM2.2 8 8 11.2 13.8 8M2.2 11 8 14.2 13.8 11',
  tokens: 'M9.5 6.5a3.5 3.5 0 1 0-2.3 3.3l1 .9h1.6v1.5h1.6v1.5h2.1v-2.2L9.4 7.4zM5.2 5.2h.01',
  docs: 'M4 1.8h5.5L12 4.3v9.9H4zM9.3 2v2.5H12M6 8h4M6 10.8h4',
  search: 'M7 11.5a4.5 4.5 0 1 0 0-9 4.5 4.5 0 0 0 0 9zM10.3 10.3l3.4 3.4',
  close: 'M4 4l8 8M12 4l-8 8',
  check: 'M3 8.5 6.3 12 13 4.5',
  up: 'M4 10l4-4 4 4',
  down: 'M4 6l4 4 4-4',
  right: 'M6 4l4 4-4 4',
  left: 'M10 4 6 8l4 4',
  download: 'M8 2.5v8M4.8 7.5 8 10.7l3.2-3.2M2.5 13.5h11',
  rerun: 'M13 8a5 5 0 1 1-1.6-3.7M13 2v3h-3',
  stop: 'M4 4h8v8H4z',
  trash: 'M2.8 4.5h10.4M6 4.2V2.5h4v1.7M4.2 4.8l.6 8.7h6.4l.6-8.7',
  copy: 'M5.5 5.5h8v8h-8zM10.5 5.2V2.5h-8v8h2.7',
  file: 'M4 1.8h5.5L12 4.3v9.9H4zM9.3 2v2.5H12',
  folder: 'M1.8 12.8V3.5h4.4l1.5 1.7h6.5v7.6z',
  link: 'M6.8 9.2a2.6 2.6 0 0 0 3.7 0l2-2a2.6 2.6 0 0 0-3.7-3.7l-.8.8M9.2 6.8a2.6 2.6 0 0 0-3.7 0l-2 2a2.6 2.6 0 0 0 3.7 3.7l.8-.8',
  warning: 'M8 2.2 14.3 13H1.7zM8 6.5v3M8 11.2h.01',
  sun: 'M8 10.8a2.8 2.8 0 1 0 0-5.6 2.8 2.8 0 0 0 0 5.6zM8 1.5v1.3M8 13.2v1.3M1.5 8h1.3M13.2 8h1.3M3.4 3.4l.9.9M11.7 11.7l.9.9M3.4 12.6l.9-.9M11.7 4.3l.9-.9',
  moon: 'M13.3 9.7A5.8 5.8 0 0 1 6.3 2.7a5.8 5.8 0 1 0 7 7z',
  system: 'M2 3h12v8H2zM5.5 13.8h5M8 11v2.8',
  keyboard: 'M1.8 4h12.4v8H1.8zM4.5 6.6h.01M7 6.6h.01M9.5 6.6h.01M12 6.6h.01M5 9.5h6',
  wrap: 'M2 4h12M2 8h9.5a2 2 0 0 1 0 4H8M9.6 10.2 7.8 12l1.8 1.8M2 12h2.5',
  clock: 'M8 14A6 6 0 1 0 8 2a6 6 0 0 0 0 12zM8 4.8V8l2.3 1.5',
  follow: 'M8 2.5v9M4.5 8.2 8 11.7l3.5-3.5M3 14h10',
  more: 'M3.5 8h.01M8 8h.01M12.5 8h.01',
  // the states of jobs: each has a shape of its own, so that colour is never all that tells
  Queued: 'M8 14A6 6 0 1 0 8 2a6 6 0 0 0 0 12zM8 5v3.2l2 1.3',
  Processing: 'M8 14A6 6 0 1 0 8 2a6 6 0 0 0 0 12zM5.5 8h5M8.3 5.6 10.7 8l-2.4 2.4',
  Submitted: 'M8 14A6 6 0 1 0 8 2a6 6 0 0 0 0 12zM8 5.3v5.4M5.6 8.2 8 10.7l2.4-2.5',
  Running: 'M8 14A6 6 0 1 0 8 2a6 6 0 0 0 0 12zM6.7 5.6v4.8L10.6 8z',
  Completed: 'M8 14A6 6 0 1 0 8 2a6 6 0 0 0 0 12zM5.3 8.2l2 2 3.4-4',
  Failed: 'M8 14A6 6 0 1 0 8 2a6 6 0 0 0 0 12zM5.9 5.9l4.2 4.2M10.1 5.9l-4.2 4.2',
  Invalid: 'M8 2.2 14.3 13H1.7zM8 6.5v3M8 11.2h.01',
  Killed: 'M5.4 2h5.2L14 5.4v5.2L10.6 14H5.4L2 10.6V5.4zM5.8 8h4.4',
  Cleaned: 'M8 14A6 6 0 1 0 8 2a6 6 0 0 0 0 12zM5.5 8h5',
  Lost: 'M8 14A6 6 0 1 0 8 2a6 6 0 0 0 0 12zM6.2 6.4a1.8 1.8 0 1 1 2.6 1.6c-.6.3-.8.6-.8 1.2M8 11h.01',
};

/** @typedef {keyof typeof PATHS} Icon */

/**
 * Make a drawing; it says nothing to screen readers, so a label must stand beside it.
 * @param {Icon} name
 */
export function icon(name) {
  const svg = document.createElementNS(NAMESPACE, 'svg');
  svg.setAttribute('viewBox', '0 0 16 16');
  svg.setAttribute('class', 'icon');
  svg.setAttribute('aria-hidden', 'true');
  const path = document.createElementNS(NAMESPACE, 'path');
  path.setAttribute('d', PATHS[name]);
  svg.append(path);
  return svg;
}

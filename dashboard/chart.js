/**
 * Small charts over time, as SVG: stacked bars for numbers of jobs, a line for seconds.
 *
 * Their words (title, figure, summary) stand in the page as text; the drawing repeats them.
 */

import { fill, h, setText } from './dom.js';
import { absolute } from './format.js';

const NAMESPACE = 'http://www.w3.org/2000/svg';
const WIDTH = 600;
const HEIGHT = 120;
const TOP = 6;

/** @typedef {{ time: number, values: (number | null)[] }} Point time in seconds */

/**
 * @typedef {object} Look
 * @property {'bars' | 'line'} kind
 * @property {string} title
 * @property {string[]} names of the values of each point
 * @property {string[]} classes of the marks of each value
 * @property {(value: number) => string} format
 */

/**
 * @param {string} tag
 * @param {Record<string, string | number>} attributes
 */
function mark(tag, attributes) {
  const element = document.createElementNS(NAMESPACE, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, String(value));
  return element;
}

/**
 * The smallest round number that is not below a value: 1, 2, 2.5, 5, 10, ...
 * @param {number} value
 */
export function roundUp(value) {
  if (value <= 0) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 2.5, 5, 10].map((step) => step * power).find((step) => step >= value * 0.9999)
    ?? value;
}

export class Chart {
  /** @param {Look} look */
  constructor(look) {
    this._look = look;
    this._figure = h('span', { class: 'chart-figure' }, '–');
    this._reading = h('span', { class: 'chart-reading' });
    this._maximum = h('span', { class: 'chart-maximum', 'aria-hidden': 'true' });
    this._from = h('span', {});
    this._svg = mark('svg', {
      viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: 'none', role: 'img',
      class: 'chart-drawing',
    });
    this.element = h('section', { class: 'chart card' },
      h('header', {}, h('h3', {}, look.title), this._figure, this._reading),
      h('div', { class: 'chart-area' }, this._svg, this._maximum),
      h('footer', { 'aria-hidden': 'true' }, this._from, h('span', {}, 'now')));
    /** @type {Point[]} */
    this._points = [];
    this._svg.addEventListener('pointermove', (event) => this._read(event));
    this._svg.addEventListener('pointerleave', () => this._leave());
  }

  /**
   * Show other points.
   * @param {Point[]} points one after the other, at equal distances
   * @param {string} figure what they say in sum
   * @param {string} from what the left end is
   */
  show(points, figure, from) {
    this._points = points;
    setText(this._figure, figure);
    setText(this._from, from);
    const sums = points.map(({ values }) => values.reduce((/** @type {number} */ sum, value) => sum + (value ?? 0), 0));
    const largest = Math.max(...sums, 0);
    const top = roundUp(largest);
    setText(this._maximum, largest > 0 ? this._look.format(top) : '');
    this._svg.setAttribute('aria-label', `${this._look.title}: ${figure}`);
    this._svg.replaceChildren(
      ...[0, 0.5, 1].map((part) => {
        const y = TOP + (HEIGHT - TOP) * part - (part === 1 ? 0.5 : 0);
        return mark('line', { class: 'chart-grid', x1: 0, x2: WIDTH, y1: y, y2: y });
      }),
      ...(this._look.kind === 'bars' ? this._bars(top) : this._line(top)),
      mark('line', { class: 'chart-cursor', x1: -9, x2: -9, y1: 0, y2: HEIGHT }),
    );
  }

  /** @param {number} top */
  _bars(top) {
    const step = WIDTH / Math.max(this._points.length, 1);
    const gap = Math.min(2, step * 0.22);
    /** @type {SVGElement[]} */
    const bars = [];
    this._points.forEach(({ values }, index) => {
      let base = HEIGHT;
      values.forEach((value, which) => {
        if (!value) return;
        // one job among thousands must not vanish
        const height = Math.max((value / top) * (HEIGHT - TOP), 1.5);
        base -= height;
        bars.push(/** @type {SVGElement} */ (mark('rect', {
          class: this._look.classes[which], x: index * step + gap / 2, y: base,
          width: step - gap, height,
        })));
      });
    });
    return bars;
  }

  /** @param {number} top */
  _line(top) {
    const step = WIDTH / Math.max(this._points.length, 1);
    const places = this._points.flatMap(({ values: [value] }, index) =>
      value === null || value === undefined
        ? []
        : [{ index, x: (index + 0.5) * step, y: HEIGHT - (value / top) * (HEIGHT - TOP) }]);
    /** @type {SVGElement[]} */
    const marks = [];
    let run = [];
    for (const [number, place] of places.entries()) {
      run.push(place);
      const following = places[number + 1];
      if (following !== undefined && following.index - place.index <= 3) continue;
      marks.push(...this._run(run, step));
      run = [];
    }
    return marks;
  }

  /**
   * @param {{ x: number, y: number }[]} places
   * @param {number} step
   */
  _run(places, step) {
    const first = places[0];
    const last = places[places.length - 1];
    const half = places.length === 1 ? Math.min(step / 2, 4) : 0;
    const path = places.map(({ x, y }) => `L${x.toFixed(1)} ${y.toFixed(1)}`).join('').slice(1);
    const line = `M${(first.x - half).toFixed(1)} ${first.y.toFixed(1)}L${path}`
      + `L${(last.x + half).toFixed(1)} ${last.y.toFixed(1)}`;
    return [
      /** @type {SVGElement} */ (mark('path', {
        class: `${this._look.classes[0]} chart-fill`,
        d: `${line}L${last.x + half} ${HEIGHT}L${first.x - half} ${HEIGHT}Z`,
      })),
      /** @type {SVGElement} */ (mark('path', { class: `${this._look.classes[0]} chart-line`, d: line })),
    ];
  }

  /** @param {Event} event */
  _read(event) {
    const pointer = /** @type {PointerEvent} */ (event);
    const box = this._svg.getBoundingClientRect();
    const part = (pointer.clientX - box.left) / box.width;
    const index = Math.min(Math.floor(part * this._points.length), this._points.length - 1);
    const point = this._points[Math.max(index, 0)];
    if (point === undefined) return;
    const words = point.values.flatMap((value, which) =>
      value ? [`${this._look.names[which]} ${this._look.format(value)}`] : []);
    fill(this._reading, `${absolute(point.time * 1000)} · ${words.join(', ') || 'nothing'}`);
    this.element.classList.add('is-read');
    const x = ((Math.max(index, 0) + 0.5) / this._points.length) * WIDTH;
    const cursor = /** @type {Element} */ (this._svg.lastElementChild);
    cursor.setAttribute('x1', String(x));
    cursor.setAttribute('x2', String(x));
  }

  _leave() {
    this.element.classList.remove('is-read');
    const cursor = this._svg.lastElementChild;
    cursor?.setAttribute('x1', '-9');
    cursor?.setAttribute('x2', '-9');
  }
}

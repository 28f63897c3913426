/** The frame around the pages: start, log-in, navigation, connection. */

/** @import {Address, Page} from './types.js' */
/** @import {Icon} from './icons.js' */

import { Access, isUnauthorized } from './access.js';
import { Api, ApiError, isAbort } from './api.js';
import { fill, find, h, setText } from './dom.js';
import { keepTimes } from './format.js';
import { icon } from './icons.js';
import { listenToKeys, showKeys } from './keyboard.js';
import { Live } from './live.js';
import { logIn } from './login.js';
import { failure } from './overlay.js';
import { currentAddress, href } from './router.js';
import { applyTheme, setTheme, theme } from './theme.js';

/** What every page gets. */
export class App {
  constructor() {
    this.api = new Api();
    this.access = new Access(this.api);
    this.live = new Live(this.api);
    this.version = '';
  }
}

/** @typedef {(app: App, address: Address, signal: AbortSignal) => Page | Promise<Page>} Opener */

/** @type {Record<string, () => Promise<{ open: Opener }>>} */
const PAGES = {
  '': () => import('./pages/overview.js'),
  jobs: () => import('./pages/jobs.js'),
  job: () => import('./pages/job.js'),
  submit: () => import('./pages/submit.js'),
  agents: () => import('./pages/agents.js'),
  services: () => import('./pages/services.js'),
  tokens: () => import('./pages/tokens.js'),
};

/** @type {[string, string, Icon, 'read' | 'submit' | 'admin'][]} */
const PLACES = [
  ['', 'Overview', 'overview', 'read'],
  ['jobs', 'Jobs', 'jobs', 'read'],
  ['submit', 'Submit', 'submit', 'submit'],
  ['agents', 'Agents', 'agents', 'read'],
  ['services', 'Services', 'services', 'read'],
  ['tokens', 'Tokens', 'tokens', 'admin'],
];

const BANNER_DELAY_MS = 1_500;

class Frame {
  /** @param {App} app */
  constructor(app) {
    this._app = app;
    this._main = find(document, 'main');
    /** @type {AbortController | null} */
    this._opening = null;
    /** @type {Page | null} */
    this._page = null;
    this._where = '';
    this._isLoggingIn = false;
    this._isListening = false;
  }

  async start() {
    applyTheme();
    keepTimes();
    listenToKeys((event) => this._page?.onKey?.(event) ?? false);
    this._app.api.onUnauthorized = () => void this._logIn();
    addEventListener('hashchange', () => void this._show());
    this._watchConnection();
    find(document, '.skip').addEventListener('click', (event) => {
      event.preventDefault();
      this._main.focus();
    });
    await this._enter();
  }

  /** Learn who we are, then show what the address says. */
  async _enter() {
    try {
      await this._app.access.learn();
    } catch (error) {
      if (isUnauthorized(error)) return; // the log-in is open already
      fill(this._main, failure(error, () => void this._enter()));
      // a server that is being started answers in a moment
      if (error instanceof ApiError && error.isPassing) setTimeout(() => void this._enter(), 2_000);
      return;
    }
    this._drawNavigation();
    const shown = this._show();
    this._listen();
    void this._learnVersion();
    await shown;
  }

  async _logIn() {
    if (this._isLoggingIn) return;
    this._isLoggingIn = true;
    this._leave();
    this._app.access.logOut();
    document.body.classList.add('is-outside');
    await logIn(this._app.access, this._main);
    document.body.classList.remove('is-outside');
    this._isLoggingIn = false;
    await this._enter();
  }

  async _learnVersion() {
    try {
      const health = await this._app.api.get('health');
      this._app.version = health.version;
      setText(find(document, '.version'), `v${health.version}`);
    } catch {
      // said by the banner, and by the page itself
    }
  }

  _leave() {
    this._opening?.abort();
    this._opening = null;
    this._page = null;
    this._where = '';
  }

  async _show() {
    // who asks decides what is shown: before that is known there is nothing to show
    if (this._isLoggingIn || this._app.access.caller === null) return;
    const address = currentAddress();
    const where = address.path.join('/');
    this._drawNavigation();
    if (this._page?.update && this._where === where) {
      this._page.update(address.query);
      return;
    }
    this._leave();
    this._where = where;
    const opening = new AbortController();
    this._opening = opening;
    const [first = '', second] = address.path;
    const name = first === 'jobs' && second !== undefined ? 'job' : first;
    this._main.classList.add('is-waiting');
    try {
      const load = PAGES[name];
      if (load === undefined) throw new Error('There is no such page.');
      const { open } = await load();
      const page = await open(this._app, address, opening.signal);
      if (opening.signal.aborted) return;
      this._page = page;
      document.title = `${page.title} · Orchestrator`;
      fill(this._main, page.element);
      this._main.focus({ preventScroll: true });
      scrollTo(0, 0);
    } catch (error) {
      if (opening.signal.aborted || isAbort(error) || isUnauthorized(error)) return;
      fill(this._main, failure(error, () => {
        this._leave();
        void this._show();
      }));
    } finally {
      if (this._opening === opening) this._main.classList.remove('is-waiting');
    }
  }

  // --- what stands around the page

  _drawNavigation() {
    const { access, api } = this._app;
    const [here = ''] = currentAddress().path;
    fill(find(document, '.places'), ...PLACES
      .filter(([path, , , role]) => access.may(role) && (path !== 'tokens' || access.userId === null))
      .map(([path, name, sign]) => h('a', {
        href: href(path), 'aria-current': path === here ? 'page' : null,
      }, icon(sign), h('span', {}, name))));
    const caller = access.caller;
    const session = find(document, '.session');
    if (api.token === null || caller === null) return fill(session);
    const whose = caller.user_id === null ? 'all users' : `user ${caller.user_id}`;
    return fill(session,
      h('div', { class: 'whoami', title: `Role ${caller.role}, ${whose}` },
        icon('tokens'), h('span', {}, `${caller.name ?? 'token'} · ${caller.role}`)),
      h('button', { class: 'button ghost small', type: 'button', on: {
        click: () => void this._logIn(),
      } }, 'Log out'));
  }

  _watchConnection() {
    const banner = find(document, '.banner');
    const lamp = find(document, '.lamp');
    let timer = 0;
    this._app.live.on('state', (isConnected) => {
      clearTimeout(timer);
      lamp.dataset.state = isConnected ? 'live' : 'lost';
      setText(lamp, isConnected ? 'Live' : 'Connecting');
      if (isConnected) banner.hidden = true;
      else timer = setTimeout(() => { banner.hidden = this._isLoggingIn; }, BANNER_DELAY_MS);
    });
  }

  /** Hear of what happens, as whoever we are now. */
  _listen() {
    if (this._isListening) this._app.live.restart();
    else void this._app.live.run();
    this._isListening = true;
  }
}

function drawThemeSwitch() {
  const choices = /** @type {const} */ ([
    ['system', 'As the system', 'system'], ['light', 'Light', 'sun'], ['dark', 'Dark', 'moon'],
  ]);
  const buttons = choices.map(([value, label, sign]) => h('button', {
    type: 'button', class: 'button ghost icon-only', title: label,
    'aria-label': `Theme: ${label}`, 'aria-pressed': String(theme() === value),
    on: { click: () => {
      setTheme(value);
      drawThemeSwitch();
      find(document, `.themes [aria-label="Theme: ${label}"]`).focus();
    } },
  }, icon(sign)));
  fill(find(document, '.themes'), ...buttons);
  const keys = find(document, '.show-keys');
  fill(keys, icon('keyboard'));
  keys.onclick = () => void showKeys();
}

drawThemeSwitch();
void new Frame(new App()).start();

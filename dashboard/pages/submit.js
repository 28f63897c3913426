/** A new job: files, the script, and where it is to run. */

/** @import {App} from '../main.js' */
/** @import {Chosen} from '../submit/dropped.js' */
/** @import {Address, Page, Service} from '../types.js' */

import { isAbort } from '../api.js';
import { h, keyed, setText } from '../dom.js';
import { bytes, counted, duration } from '../format.js';
import { icon } from '../icons.js';
import { complain, copy, note } from '../overlay.js';
import { go, href } from '../router.js';
import { curlCommand, lineCommand } from '../submit/commands.js';
import { filesOf, filesOfInput } from '../submit/dropped.js';
import { upload } from '../submit/upload.js';

const SCRIPT = 'run.sh';
const FIRST_SCRIPT = '# What the job does; its files lie beside this script.\n'
  + 'set -eu\n\necho "hello from $(hostname)"\n';
const MAX_BYTES = 400 * 2 ** 20;
const MAX_SAID_BYTES = 2 ** 45; // a limit above is none
const MAX_EDITED_BYTES = 256 * 1024;
const SHOWN_FILES = 100;
const USER_KEY = 'orchestrator.user';
const EXAMPLE = ['run.sh', 'analyse.awk', '2oob_A.pdb'];

/**
 * @param {App} app
 * @param {Address} address
 * @param {AbortSignal} signal
 * @returns {Promise<Page>}
 */
export async function open(app, address, signal) {
  const { services } = await app.api.get('services', { signal });
  const form = new SubmitForm(app, services, signal);
  if (address.query.get('example')) await form.loadExample();
  return {
    title: 'Submit a job',
    element: form.element,
    update: (query) => {
      if (query.get('example')) void form.loadExample();
    },
  };
}

class SubmitForm {
  _serviceHint = h('p', { class: 'hint' });
  _user = this._input('user_id', { inputmode: 'numeric', required: true });
  _name = this._input('name', { maxlength: 200 });
  _tags = this._input('tags', { placeholder: 'project:kinase  stage:2' });
  _priority = this._input('priority', { inputmode: 'numeric', placeholder: '0' });
  _timeout = this._input('timeout', { inputmode: 'numeric', placeholder: 'none of its own' });
  _cpus = this._input('cpus', { inputmode: 'decimal' });
  _memory = this._input('memory', { placeholder: '512M, 8G' });
  _gpus = this._input('gpus', { inputmode: 'numeric' });
  _service = h('select', { id: 'service', on: { change: () => this._draw() } });
  _list = h('ul', { class: 'chosen' });
  _sum = h('p', { class: 'quiet', role: 'status' });
  _script = h('textarea', {
    id: 'script', class: 'code', rows: 9, spellcheck: false, autocapitalize: 'off',
    value: FIRST_SCRIPT, 'aria-describedby': 'script-hint', on: { input: () => this._draw() },
  });
  _scriptNote = h('p', { class: 'hint', id: 'script-hint' });
  _problem = h('p', { class: 'field-error', role: 'alert' });
  _progress = h('progress', { max: 1, value: 0, 'aria-label': 'Upload' });
  _progressText = h('span', { class: 'quiet' });
  _submitButton = h('button', { class: 'button primary', type: 'submit' }, icon('submit'), 'Submit');
  _sendingPart = h('div', { class: 'sending', hidden: true }, this._progress, this._progressText,
    h('button', { class: 'button', type: 'button', on: { click: () => this._sending?.abort() } }, 'Cancel'));
  _curl = new Command('curl');
  _line = new Command('Command line');

  /**
   * @param {App} app
   * @param {Service[]} services
   * @param {AbortSignal} signal
   */
  constructor(app, services, signal) {
    this._app = app;
    this._services = services.filter((service) => service.is_configured);
    this._signal = signal;
    /** @type {Map<string, File>} by path; the script is apart */
    this._files = new Map();
    this._key = crypto.getRandomValues(new Uint32Array(4)).join('-');
    /** @type {AbortController | null} */
    this._sending = null;
    this._service.append(...this._services.map(({ name }) => h('option', { value: name }, name)));
    this._user.value = String(app.access.userId ?? localStorage.getItem(USER_KEY) ?? 1);
    this._user.readOnly = app.access.userId !== null;
    this.element = h('div', { class: 'page submit' },
      h('header', { class: 'page-head' }, h('h1', {}, 'Submit a job'),
        h('div', { class: 'page-actions' }, h('button', { class: 'button', type: 'button', on: {
          click: () => void this.loadExample(),
        } }, 'Load the example'))),
      h('div', { class: 'submit-columns' },
        h('form', { class: 'submit-form', novalidate: '', on: { submit: (/** @type {Event} */ event) => {
          event.preventDefault();
          void this._send();
        } } }, this._filesPart(), this._scriptPart(), this._fieldsPart(),
        h('div', { class: 'submit-end' }, this._problem, this._sendingPart, this._submitButton)),
        h('aside', { class: 'commands', 'aria-label': 'The same in a terminal' },
          h('h2', {}, 'The same in a terminal'), this._curl.element, this._line.element)));
    this._acceptDrops();
    this._draw();
  }

  // --- making it

  _fieldsPart() {
    return h('section', { class: 'card form-part' },
      h('h2', {}, 'Job'),
      h('div', { class: 'fields' },
        field('Service', this._service, this._serviceHint),
        field('User', this._user, this._user.readOnly
          ? 'Your token is for this user.' : 'The number on whose account it runs.'),
        field('Name', this._name, 'For people; may be empty.', 'span-2')),
      h('details', {}, h('summary', {}, 'More: priority, time limit, resources, tags'),
        h('div', { class: 'fields' },
          field('Priority', this._priority, 'From -100 to 100, among this user’s jobs.'),
          field('Time limit in seconds', this._timeout, ''),
          field('CPUs', this._cpus, ''), field('Memory', this._memory, ''), field('GPUs', this._gpus, ''),
          field('Tags', this._tags, 'key:value, separated by spaces.'))));
  }

  /**
   * @param {string} id
   * @param {Record<string, any>} properties
   */
  _input(id, properties) {
    return h('input', { id, autocomplete: 'off', spellcheck: false, ...properties,
      on: { input: () => this._draw() } });
  }

  _filesPart() {
    const take = (/** @type {Event} */ event) => {
      const input = /** @type {HTMLInputElement} */ (event.target);
      void this._take(filesOfInput(/** @type {FileList} */ (input.files)));
      input.value = '';
    };
    const files = h('input', { type: 'file', multiple: true, class: 'unseen', id: 'files', on: { change: take } });
    const folder = h('input', { type: 'file', webkitdirectory: '', class: 'unseen', id: 'folder', on: { change: take } });
    return h('section', { class: 'card form-part' },
      h('h2', {}, 'Input files'),
      h('div', { class: 'drop' }, icon('submit'),
        h('p', {}, 'Drop files or a directory here, or choose ',
          h('label', { for: 'files', class: 'link' }, 'files'), files, ' or ',
          h('label', { for: 'folder', class: 'link' }, 'a directory'), folder, '.')),
      this._list, this._sum);
  }

  _scriptPart() {
    return h('section', { class: 'card form-part' },
      h('h2', {}, h('label', { for: 'script' }, SCRIPT)), this._script, this._scriptNote);
  }

  _acceptDrops() {
    const { element } = this;
    const isFiles = (/** @type {DragEvent} */ event) => event.dataTransfer?.types.includes('Files') ?? false;
    let depth = 0;
    element.addEventListener('dragenter', (event) => {
      if (!isFiles(event)) return;
      depth += 1;
      element.classList.add('is-over');
    });
    element.addEventListener('dragleave', () => {
      depth = Math.max(0, depth - 1);
      if (depth === 0) element.classList.remove('is-over');
    });
    element.addEventListener('dragover', (event) => {
      if (isFiles(event)) event.preventDefault();
    });
    element.addEventListener('drop', (event) => {
      if (!isFiles(event) || event.dataTransfer === null) return;
      event.preventDefault();
      depth = 0;
      element.classList.remove('is-over');
      filesOf(event.dataTransfer).then((chosen) => this._take(chosen)).catch(complain);
    });
  }

  // --- files

  /** @param {Chosen[]} chosen */
  async _take(chosen) {
    for (const { path, file } of chosen) {
      if (path === SCRIPT && file.size <= MAX_EDITED_BYTES) {
        this._files.delete(SCRIPT);
        this._script.value = await file.text();
      } else {
        this._files.set(path, file);
      }
    }
    this._draw();
  }

  /** Put the project's example in place of all that was chosen. */
  async loadExample() {
    try {
      const base = new URL('../example/', import.meta.url);
      const files = await Promise.all(EXAMPLE.map(async (name) => {
        const response = await fetch(new URL(name, base), { signal: this._signal, credentials: 'omit' });
        if (!response.ok) throw new Error(`The example can’t be had: ${response.status}`);
        return { path: name, file: new File([await response.blob()], name) };
      }));
      this._files.clear();
      await this._take(files);
      const example = this._services.find(({ name }) => name === 'example');
      if (example) this._service.value = 'example';
      this._name.value ||= 'A protein structure';
      this._draw();
      history.replaceState(null, '', href('submit'));
    } catch (error) {
      if (!isAbort(error)) complain(error);
    }
  }

  // --- drawing

  /** The fields of the form that are not empty, as the API calls them. */
  get _fields() {
    const value = (/** @type {HTMLInputElement | HTMLSelectElement} */ input) => input.value.trim();
    /** @type {[string, string][]} */
    const fields = [
      ['user_id', value(this._user)], ['service', value(this._service)], ['name', value(this._name)],
      ['priority', value(this._priority)], ['timeout', value(this._timeout)],
      ['cpus', value(this._cpus)], ['memory', value(this._memory)], ['gpus', value(this._gpus)],
      ...value(this._tags).split(/\s+/).map((tag) => /** @type {[string, string]} */ (['tag', tag])),
    ];
    return fields.filter(([, text]) => text !== '');
  }

  _draw() {
    this._key = crypto.getRandomValues(new Uint32Array(4)).join('-');
    const paths = [...this._files.keys()];
    keyed(this._list, paths.slice(0, SHOWN_FILES), (path) => path, (path) => h('li', {},
      icon('file'), h('span', { class: 'chosen-path' }, path),
      h('span', { class: 'quiet' }, bytes(this._files.get(path)?.size ?? 0)),
      h('button', { class: 'button ghost icon-only', type: 'button', 'aria-label': `Remove ${path}`, on: {
        click: () => {
          this._files.delete(path);
          this._draw();
        },
      } }, icon('close'))));
    const sum = [...this._files.values()].reduce((total, { size }) => total + size, 0);
    setText(this._sum, paths.length === 0 ? ''
      : `${counted(paths.length, 'file')}, ${bytes(sum)}`
        + (paths.length > SHOWN_FILES ? `; the first ${SHOWN_FILES} are shown` : ''));
    const isTooLarge = this._files.has(SCRIPT);
    this._script.disabled = isTooLarge;
    setText(this._scriptNote, isTooLarge
      ? 'The run.sh that was chosen is too long to be edited here; it is sent as it is.'
      : 'Runs with bash, in a fresh directory with the files above. Exit code 0 is success.');
    this._drawService();
    const all = [SCRIPT, ...paths.filter((path) => path !== SCRIPT)];
    this._curl.show(curlCommand(this._app, all, this._fields));
    this._line.show(lineCommand(all, this._fields));
  }

  _drawService() {
    const service = this._services.find(({ name }) => name === this._service.value);
    const words = service === undefined ? ['No service is configured.'] : [
      service.timeout === null ? 'No time limit' : `At most ${duration(service.timeout)}`,
      service.agents.length === 0 ? 'no agent offers it now' : '',
      service.median_run === null ? '' : `runs ${duration(service.median_run)} in the median`,
    ];
    this._drawLimits(service);
    setText(this._serviceHint, `${words.filter(Boolean).join(', ')}.`);
  }

  /**
   * Say beside the fields what a job gets that asks for nothing, and what it may ask for.
   * @param {Service | undefined} service
   */
  _drawLimits(service) {
    const { resources: usual, max_resources: most } = service ?? {};
    const limits = /** @type {[HTMLInputElement, string, string][]} */ ([
      [this._cpus, usual ? String(usual.cpus) : '', most ? String(most.cpus) : ''],
      [this._memory, usual?.memory ? bytes(usual.memory) : 'no limit',
        most?.memory && most.memory < MAX_SAID_BYTES ? bytes(most.memory) : ''],
      [this._gpus, usual ? String(usual.gpus) : '', most ? String(most.gpus) : ''],
    ]);
    for (const [input, asked, limit] of limits) {
      const hint = input.parentElement?.querySelector('.hint');
      if (hint) setText(hint, usual ? `${asked} if empty${limit ? `, at most ${limit}` : ''}.` : '');
    }
  }

  // --- sending

  get _form() {
    const form = new FormData();
    for (const [name, value] of this._fields) form.append(name, value);
    if (!this._files.has(SCRIPT)) {
      const text = this._script.value.replaceAll('\r\n', '\n');
      form.append('file', new File([text], SCRIPT), SCRIPT);
    }
    for (const [path, file] of this._files) form.append('file', file, path);
    return form;
  }

  async _send() {
    const problem = this._whatIsWrong();
    setText(this._problem, problem);
    if (problem || this._sending !== null) return;
    this._sending = new AbortController();
    this._showSending(true);
    try {
      const signal = AbortSignal.any([this._sending.signal, this._signal]);
      const job = await upload(this._app.api, this._form, this._key, (sent, total) =>
        this._showProgress(sent, total), signal);
      if (this._app.access.userId === null) {
        localStorage.setItem(USER_KEY, this._user.value);
      }
      note(icon('check'), `Job ${job.id} is submitted.`);
      go(href(`jobs/${job.id}`));
    } catch (error) {
      if (isAbort(error)) note('Given up; nothing was submitted.');
      else setText(this._problem, error instanceof Error ? error.message : String(error));
    }
    this._sending = null;
    this._showSending(false);
  }

  _whatIsWrong() {
    const size = [...this._files.values()].reduce((total, file) => total + file.size, 0);
    if (!/^-?\d+$/.test(this._user.value.trim())) {
      return 'User must be a number.';
    }
    if (size > MAX_BYTES) return `These are ${bytes(size)}; at most ${bytes(MAX_BYTES)} can be sent at a time.`;
    return '';
  }

  /** @param {boolean} isSending */
  _showSending(isSending) {
    this._sendingPart.hidden = !isSending;
    this._submitButton.hidden = isSending;
    this._showProgress(0, 0);
  }

  /**
   * @param {number} sent
   * @param {number} total
   */
  _showProgress(sent, total) {
    this._progress.max = total || 1;
    this._progress.value = sent;
    setText(this._progressText, total === 0 ? 'Starting …'
      : sent < total ? `${bytes(sent)} of ${bytes(total)}` : 'The server is storing it …');
  }
}

/** A command that does the same, to be copied. */
class Command {
  _text = h('pre', { class: 'code', tabIndex: 0 });

  /** @param {string} name */
  constructor(name) {
    const button = h('button', { class: 'button ghost small', type: 'button' }, icon('copy'), 'Copy');
    button.addEventListener('click', () => void copy(button, this._text.textContent ?? ''));
    this._text.setAttribute('aria-label', `The same with ${name}`);
    this.element = h('section', { class: 'card' },
      h('header', {}, h('h3', {}, name), button), this._text);
  }

  /** @param {string} text */
  show(text) {
    setText(this._text, text);
  }
}

/**
 * @param {string} label
 * @param {HTMLInputElement | HTMLSelectElement} input
 * @param {string | HTMLElement} hint
 * @param {string} [kind]
 */
function field(label, input, hint, kind = '') {
  const words = typeof hint === 'string' ? h('p', { class: 'hint' }, hint) : hint;
  words.id = `${input.id}-hint`;
  input.setAttribute('aria-describedby', words.id);
  return h('div', { class: `field ${kind}` }, h('label', { for: input.id }, label), input, words);
}

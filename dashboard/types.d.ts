/**
 * What the API answers, as far as the pages use it. Only the type checker reads this file.
 * The meaning of each field is in openapi.yaml.
 */

export type State =
  | 'Queued' | 'Processing' | 'Submitted' | 'Running'
  | 'Completed' | 'Failed' | 'Invalid' | 'Killed' | 'Cleaned';

export interface Resources { cpus: number; memory: number | null; gpus: number }

export interface Usage {
  cpu_seconds: number | null; peak_memory: number | null; wall_seconds: number | null;
}

export interface JobSummary {
  id: number; status: State; message: string; user_id: number; service: string; name: string;
  priority: number; timeout: number | null; tags: Record<string, string>;
  dest_id: number | null; agent: string | null;
  created_at: string; changed_at: string; started_at: string | null; finished_at: string | null;
  outcome?: State | null;
}

export interface Attempt {
  id: number; number: number; agent: string; exit_code: number | null; message: string;
  outcome: State | 'Lost' | null;
  assigned_at: string | null; started_at: string | null; ended_at: string | null;
  usage?: Usage | null;
}

export interface JobDetails extends JobSummary {
  attempts: Attempt[];
  files: { name: string; size: number; sha256: string }[];
  result: { size: number; sha256: string } | null;
  queue: { position: number; reason: string } | null;
  resources?: Resources; usage?: Usage | null; waiting_reason?: string | null;
}

export interface JobPage { jobs: JobSummary[]; next_cursor: string | null }

export interface Transition {
  id: number; status: State; message: string; previous: State | null; attempt: number;
  user_id: number; service: string; at: string;
}

export interface AgentChange { id: string; name: string; status: string; at: string }

export interface Isolation {
  default: string;
  kinds: { kind: string; is_given: boolean; notes: string[] }[];
  not_offered: { service: string; reason: string }[];
}

export interface Agent {
  name: string; id: string | null; version: string | null; services: string[] | null;
  slots: number; busy: number; jobs: number[]; is_connected: boolean; is_drained: boolean;
  heartbeat_age: number | null; load: number | null; connected_since: string | null;
  address: string | null; lease_left: number | null;
  resources?: { total: Resources; free: Resources }; isolation?: Isolation;
  problem?: string | null; set_aside?: string | null;
  services_set_aside?: { service: string; reason: string }[];
}

export interface Service {
  name: string; is_configured: boolean; runs_per_user: number | null; max_runs: number | null;
  timeout: number | null; active: number; queued: number; agents: string[];
  median_wait: number | null; median_run: number | null;
  resources?: Resources | null; max_resources?: Resources | null; isolation?: string | null;
}

export interface StatsPoint {
  time: number; submitted: number; completed: number; failed: number; killed: number;
  invalid: number; wait_seconds: number | null; run_seconds: number | null;
}

export interface Stats {
  period: string; step_seconds: number; points: StatsPoint[];
  disk: { free: number; total: number; database: number };
}

export interface Caller {
  is_token_needed: boolean; name: string | null; role: 'read' | 'submit' | 'admin';
  user_id: number | null;
}

export interface Token { name: string; role: string; user_id: number | null; created_at: string }

export interface FileEntry {
  path: string; type: 'file' | 'directory' | 'link'; size: number; modified?: string;
  mode?: string; sha256?: string;
}

export interface FileList {
  id: number; source: 'input' | 'result'; files: FileEntry[]; next_cursor: string | null;
}

export interface BulkAnswer { matched: number; done: number; skipped: number; jobs?: number[] }

export interface Counts { total: number; states: Record<State, number> }

/** What the address says: `#/jobs/7?stream=stderr`. */
export interface Address { path: string[]; query: URLSearchParams }

/** A page that is shown; `signal` of its opening ends all that it started. */
export interface Page {
  title: string;
  element: HTMLElement;
  /** The same page with another query. Without it the page is opened anew. */
  update?: (query: URLSearchParams) => void;
  /** Called for keys that the frame does not know; true: it was meant for this page. */
  onKey?: (event: KeyboardEvent) => boolean;
}

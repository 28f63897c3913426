/** What needs somebody: found in what the server says of itself. */

/** @import {Agent, Service, Stats} from '../types.js' */

import { bytes, counted, duration } from '../format.js';
import { href } from '../router.js';

const GIB = 2 ** 30;

/**
 * @typedef {object} Item
 * @property {string} key
 * @property {'bad' | 'warn' | 'good'} level
 * @property {string} text
 * @property {string} [href] where one can act
 * @property {string} [action] what the link says
 */

/**
 * @param {readonly Agent[]} agents
 * @param {readonly Service[]} services
 * @param {Stats | null} stats of the last hour
 * @returns {Item[]} the worst first, never empty
 */
export function attention(agents, services, stats) {
  const items = [
    ...ofDisk(stats),
    ...ofServices(services, agents),
    ...agents.flatMap(ofAgent),
    ...ofFailures(stats),
  ];
  if (items.length === 0) return [{ key: 'good', level: 'good', text: 'Nothing. All is well.' }];
  return items.sort((one, other) => Number(other.level === 'bad') - Number(one.level === 'bad'));
}

/**
 * @param {Stats | null} stats
 * @returns {Item[]}
 */
function ofDisk(stats) {
  const disk = stats?.disk;
  if (!disk || (disk.free > disk.total / 10 && disk.free > GIB)) return [];
  const isFull = disk.free < disk.total / 50 || disk.free < GIB / 4;
  return [{
    key: 'disk', level: isFull ? 'bad' : 'warn', action: 'Jobs to delete',
    text: `The server’s disk is nearly full: ${bytes(disk.free)} of ${bytes(disk.total)} are free.`,
    href: href('jobs', { status: 'Completed,Failed,Killed,Invalid' }),
  }];
}

/**
 * @param {readonly Service[]} services
 * @param {readonly Agent[]} agents
 * @returns {Item[]}
 */
function ofServices(services, agents) {
  if (agents.length > 0 || services.length > 0) {
    if (!agents.some((agent) => agent.is_connected)) {
      const waiting = services.reduce((sum, { queued }) => sum + queued, 0);
      return [{
        key: 'no-agent', level: 'bad', href: href('agents'), action: 'Agents',
        text: `No agent is connected${waiting > 0 ? `; ${counted(waiting, 'job')} wait` : ''}.`,
      }];
    }
  }
  return services.flatMap(ofService);
}

/**
 * @param {Service} service
 * @returns {Item[]}
 */
function ofService({ name, queued, active, agents, is_configured: isConfigured }) {
  const link = href('jobs', { service: name, status: 'Queued' });
  if (!isConfigured) {
    return [{
      key: `service-${name}`, level: 'warn', href: link, action: 'Jobs',
      text: `Service ${name} is not configured, but has ${counted(queued + active, 'job')}.`,
    }];
  }
  if (agents.length > 0) return [];
  return [{
    key: `service-${name}`, level: queued > 0 ? 'bad' : 'warn', href: link, action: 'Jobs',
    text: queued > 0
      ? `No agent offers ${name}; ${counted(queued, 'job')} wait${queued === 1 ? 's' : ''}.`
      : `No agent offers ${name}.`,
  }];
}

/**
 * @param {Agent} agent
 * @returns {Item[]}
 */
function ofAgent(agent) {
  const place = { href: href('agents'), action: 'Agents' };
  if (agent.set_aside) {
    return [{ ...place, key: `aside-${agent.id}`, level: 'bad',
      text: `${agent.name} is set aside: ${agent.set_aside}` }];
  }
  if (agent.problem) {
    return [{ ...place, key: `problem-${agent.id}`, level: 'bad',
      text: `${agent.name} starts no jobs: ${agent.problem}` }];
  }
  if (agent.services_set_aside?.length) {
    return agent.services_set_aside.map(({ service, reason }) => ({
      ...place, key: `aside-${agent.id}-${service}`, level: 'bad',
      text: `${service} is set aside on ${agent.name}: ${reason}`,
    }));
  }
  if (!agent.is_connected && agent.busy > 0) {
    const left = agent.lease_left === null ? '' : `; they go to others in ${duration(agent.lease_left)}`;
    return [{ ...place, key: `away-${agent.id}`, level: 'bad',
      text: `${agent.name} is away with ${counted(agent.busy, 'job')}${left}.` }];
  }
  if (agent.is_drained) {
    return [{ ...place, key: `drained-${agent.id}`, level: 'warn',
      text: `${agent.name} is drained and gets no jobs.` }];
  }
  return [];
}

/**
 * @param {Stats | null} stats
 * @returns {Item[]}
 */
function ofFailures(stats) {
  const failed = (stats?.points ?? []).reduce((sum, point) => sum + point.failed + point.invalid, 0);
  if (failed === 0) return [];
  return [{
    key: 'failed', level: 'warn', action: 'Look',
    text: `${counted(failed, 'job')} failed in the last hour.`,
    href: href('jobs', { status: 'Failed,Invalid', since: '24h' }),
  }];
}

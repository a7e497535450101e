// A load test of a running, seeded hop, for k6 (https://k6.io): does it answer everything right
// while it is busy, and are warm redirects fast? `make smoke` (20 s, in CI) and `make load` run it:
//
//   k6 run -e PROFILE=smoke|full [-e BASE_URL=http://localhost:8080] [-e API_TOKEN=...] loadtest.js
//
// Of 100 requests 95 are redirects (93 of live seeded links, 2 that must be 404), 2 create a link
// (and follow it), 2 read statistics and 1 asks for /health.
import { check, fail, sleep } from 'k6';
import { SharedArray } from 'k6/data';
import exec from 'k6/execution';
import http from 'k6/http';

const BASE_URL = (__ENV.BASE_URL || 'http://localhost:8080').replace(/\/+$/, '');
const SEEDS = __ENV.SEEDS || 'seeds/urls.csv'; // what `hop seed` loaded

// Seconds between two requests of one user: at most 0.3, so that 500 users make at least
// 500 / 0.3 = 1,667 requests/s as long as hop answers fast; on average 500 / 0.2 = 2,500.
const THINK_MIN = 0.1;
const THINK_MAX = 0.3;
const USERS = 500;
const HOLD_SECONDS = 90;

const profiles = {
  smoke: { executor: 'constant-vus', vus: 20, duration: '20s' },
  full: {
    executor: 'ramping-vus',
    startVUs: 0,
    stages: [
      { duration: '30s', target: 100 },
      { duration: '60s', target: USERS },
      { duration: `${HOLD_SECONDS}s`, target: USERS },
      { duration: '30s', target: 0 },
    ],
  },
};
const profile = __ENV.PROFILE || 'smoke';
if (!profiles[profile]) throw new Error(`PROFILE=${profile}: smoke or full`);

const thresholds = {
  http_req_failed: ['rate==0'],
  checks: ['rate==1'],
  'http_req_duration{kind:warm}': ['p(95)<100'],
};
if (profile === 'full') {
  // The same with all users there, and proof that they made the load they were meant to make:
  // fewer requests although they were fast means that k6 itself had too little processor.
  thresholds['http_req_duration{kind:warm,phase:top}'] = ['p(95)<100'];
  thresholds['http_reqs{phase:top}'] = [`count>=${1500 * HOLD_SECONDS}`];
}

export const options = {
  scenarios: { [profile]: profiles[profile] },
  thresholds,
  maxRedirects: 0, // hop is under test, not the targets
  discardResponseBodies: true,
  summaryTrendStats: ['avg', 'med', 'p(95)', 'p(99)', 'max'],
};

// One row of CSV: fields, quoted ones with "" for a quote.
function fields(line) {
  return [...line.matchAll(/(?:^|,)(?:"((?:[^"]|"")*)"|([^,]*))/g)]
    .map(([, quoted, plain]) => (quoted === undefined ? plain : quoted.replace(/""/g, '"')));
}

// SharedArray: read once, not once per user.
const [live, asleep] = ['True', 'False'].map((active) => new SharedArray(`is_active ${active}`, () => {
  const [header, ...lines] = open(SEEDS).trim().split('\n');
  const column = (name) => fields(header).indexOf(name);
  const [code, url, isActive] = ['short_code', 'original_url', 'is_active'].map(column);
  return lines.map(fields)
    .filter((row) => row[isActive] === active)
    .map((row) => ({ code: row[code], url: row[url] }));
}));

const pick = (list) => list[Math.floor(Math.random() * list.length)];

const alphabet = '0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz';
const randomCode = (length) => Array.from({ length }, () => pick(alphabet)).join('');

const authorization = __ENV.API_TOKEN ? { Authorization: `Bearer ${__ENV.API_TOKEN}` } : {};

// kind is what is asked for; name keeps k6 from counting every code as an address of its own.
// Any other status than the one expected is a failed request.
function params(kind, name, status, more = {}) {
  const phase = exec.instance.vusActive >= USERS ? 'top' : 'ramp';
  return { tags: { kind, name, phase }, responseCallback: http.expectedStatuses(status), ...more };
}

function follow(kind, code, url) {
  const res = http.get(`${BASE_URL}/${code}`, params(kind, 'GET /{code}', 302));
  check(res, {
    'redirect: 302': (r) => r.status === 302,
    'redirect: Location is the target, byte for byte': (r) => r.headers.Location === url,
  });
}

function missing(code) {
  const res = http.get(`${BASE_URL}/${code}`, params('missing', 'GET /{code}', 404));
  check(res, {
    'unknown or inactive: 404': (r) => r.status === 404,
    'unknown or inactive: no Location': (r) => r.headers.Location === undefined,
  });
}

function create() {
  const url = `https://example.com/load/${exec.vu.idInTest}/${exec.vu.iterationInScenario}?at=${Date.now()}`;
  const res = http.post(`${BASE_URL}/shorten`, JSON.stringify({ original_url: url }), params('create', 'POST /shorten', 201, {
    headers: { 'Content-Type': 'application/json', ...authorization },
    responseType: 'text',
  }));
  const link = res.status === 201 ? res.json() : {};
  const created = check(link, {
    'create: the target as sent': (l) => l.original_url === url,
    'create: short_url ends in the code': (l) => Boolean(l.short_code) && l.short_url.endsWith(`/${l.short_code}`),
  });
  if (created) follow('new', link.short_code, url);
}

function stats() {
  const { code } = pick(live);
  const res = http.get(`${BASE_URL}/stats/${code}`, params('stats', 'GET /stats/{code}', 200, {
    headers: authorization,
    responseType: 'text',
  }));
  check(res, { 'stats: a click count': (r) => r.status === 200 && r.json('click_count') >= 0 });
}

function health() {
  const res = http.get(`${BASE_URL}/health`, params('health', 'GET /health', 200, { responseType: 'text' }));
  check(res, { 'health: ok': (r) => r.status === 200 && r.json('status') === 'ok' });
}

// One clear message instead of thousands when hop is not there or not seeded.
export function setup() {
  const { code, url } = live[0];
  const res = http.get(`${BASE_URL}/${code}`, params('setup', 'GET /{code}', 302));
  if (res.error_code >= 1000 && res.error_code < 1400) fail(`no hop at ${BASE_URL}: ${res.error}`);
  if (res.headers.Location !== url) fail(`${BASE_URL}/${code} is not ${url}: is this database seeded from ${SEEDS}?`);
}

export default function () {
  const dice = Math.random() * 100;
  if (dice < 93) {
    const { code, url } = pick(live);
    follow('warm', code, url);
  } else if (dice < 94) missing(pick(asleep).code);
  else if (dice < 95) missing(randomCode(8)); // seeded codes have 6 characters, new ones 7
  else if (dice < 97) create();
  else if (dice < 99) stats();
  else health();
  sleep(THINK_MIN + Math.random() * (THINK_MAX - THINK_MIN));
}

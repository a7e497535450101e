// browser.js: hop's pages in a real Chromium, as people use them: with a mouse, with the keyboard
// alone, on a phone, in the dark, and from a page of another site. It fails at the first step that
// goes wrong. Every page it sees must be without an error in the console, without a request to
// elsewhere, without a finding of axe, without sideways scrolling and small.
//
// From the environment: OPEN and CLOSED are the addresses of two hops on one empty DATABASE_URL,
// the second with API_TOKEN; PSQL is PostgreSQL's client; OUT is where screenshots go.
'use strict'
const assert = require('node:assert/strict')
const fs = require('node:fs')
const http = require('node:http')
const path = require('node:path')
const { execFileSync } = require('node:child_process')
const { chromium } = require('playwright-core')

const { OPEN, CLOSED, API_TOKEN, DATABASE_URL, PSQL, OUT } = process.env
const axe = fs.readFileSync(require.resolve('axe-core/axe.min.js'), 'utf8')
const attack = '"><script>alert(1)</script>'
const maxPage = 20 * 1024 // bytes of a page with its style and script

// A person's: hop counts the clicks of headless browsers apart.
const userAgent = 'Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) ' +
  'Chrome/156.0.0.0 Safari/537.36'

const flags = [ // no word to its makers, which closed networks refuse many times at once
  '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
  '--disable-background-networking', '--disable-component-update', '--disable-sync'
]

// What a stranger types into the prompt, before giving up.
const guess = { username: 'anybody', password: 'guess' }

const sizes = new Map() // the most bytes seen of each page
let looked = 0 // how often axe looked at a page

// step runs one step and says so.
async function step (name, run) {
  const start = Date.now()
  await run()
  console.log(`ok ${name} (${Date.now() - start} ms)`)
}

// elsewhere is another site: its pages are what links lead to, and where others try to write from.
function elsewhere () {
  const server = http.createServer((request, response) => {
    response.setHeader('Content-Type', 'text/html')
    response.end(`<!doctype html><html lang="en"><title>elsewhere</title><h1>${'elsewhere'}</h1>`)
  })
  return new Promise((resolve) => {
    server.listen(0, '127.0.0.1', () => resolve(server))
  })
}

// openPage opens a window whose errors are collected. Options are those of a browser context.
async function openPage (browser, options = {}) {
  const context = await browser.newContext({
    userAgent, viewport: { width: 1280, height: 900 }, ...options
  })
  const page = await context.newPage()
  page.setDefaultTimeout(10000)
  page.errors = []
  page.on('pageerror', (error) => page.errors.push(String(error)))
  page.on('dialog', (dialog) => page.errors.push('a dialog: ' + dialog.message()))
  page.on('console', (message) => {
    // Chromium reports the status of a page that is meant to be an error.
    const isStatus = message.text().startsWith('Failed to load resource: the server responded')
    const isPage = message.location().url.split('#')[0] === page.url().split('#')[0]
    if (message.type() === 'error' && !(isStatus && isPage)) page.errors.push(message.text())
  })
  page.on('request', (request) => {
    const isOwn = [OPEN, CLOSED].includes(new URL(request.url()).origin)
    const isPart = !request.isNavigationRequest()
    const from = [OPEN, CLOSED].includes(new URL(page.url(), OPEN).origin)
    if (isPart && from && !isOwn) page.errors.push('a request to ' + request.url())
  })
  return page
}

// check looks at the page that is open: errors, width, and axe. name is what it is called.
async function check (page, name) {
  assert.deepEqual(page.errors, [], name)
  const { scroll, width } = await page.evaluate(() => ({
    scroll: document.documentElement.scrollWidth, width: window.innerWidth
  }))
  assert.ok(scroll <= width, `${name} is ${scroll} px wide on a screen of ${width}`)
  await page.evaluate(axe)
  const found = await page.evaluate(async () => {
    const result = await window.axe.run(document)
    return result.violations.map((v) => `${v.id}: ${v.nodes.map((n) => n.html).join(' ')}`)
  })
  assert.deepEqual(found, [], `axe on ${name}`)
  looked++
}

// visit opens an address, checks the page and measures it.
async function visit (page, address, status, name) {
  const bodies = []
  const keep = (response) => bodies.push(response.body().catch(() => Buffer.alloc(0)))
  page.on('response', keep)
  const response = await page.goto(address, { waitUntil: 'networkidle' })
  page.off('response', keep)
  assert.equal(response.status(), status, address)
  const bytes = (await Promise.all(bodies)).reduce((sum, body) => sum + body.length, 0)
  sizes.set(name, Math.max(bytes, sizes.get(name) || 0))
  assert.ok(bytes <= maxPage, `${name} has ${bytes} bytes`)
  await check(page, name)
}

// press presses keys in turn.
async function press (page, ...keys) {
  for (const key of keys) await page.keyboard.press(key)
}

// focused is what the keyboard is on: its text or label, and whether one sees that it is.
function focused (page) {
  return page.evaluate(() => {
    const element = document.activeElement
    const label = element.labels && element.labels[0]
    const outline = window.getComputedStyle(element)
    return {
      text: (element.getAttribute('aria-label') || (label || element).textContent).trim(),
      seen: outline.outlineStyle !== 'none' && parseFloat(outline.outlineWidth) >= 2
    }
  })
}

// tabTo presses Tab until the keyboard is on something with this text. Each stop must be seen.
async function tabTo (page, text) {
  for (let i = 0; i < 200; i++) {
    await page.keyboard.press('Tab')
    const at = await focused(page)
    assert.ok(at.seen, `one does not see that the keyboard is on ${at.text}`)
    if (at.text.startsWith(text)) return
  }
  assert.fail(`the keyboard does not get to ${text}`)
}

// row is a link in the list.
const row = (page, code) => page.locator('.links li').filter({
  has: page.locator(`a:text-is("${code}")`)
})

// field is a field of the form that makes links.
const field = (page, label) => page.locator('form.create').getByLabel(label)

// create fills in the form and sends it.
async function create (page, fields) {
  for (const [label, value] of Object.entries(fields)) await field(page, label).fill(value)
  await page.getByRole('button', { name: 'Make the link' }).click()
}

async function usual (browser, site) {
  const page = await openPage(browser)
  const target = site + '/landing?a=1&b=%22'

  await step('the empty list says what to do', async () => {
    await visit(page, OPEN + '/', 200, 'empty start page')
    assert.match(await page.locator('main').innerText(), /There is no link yet/)
  })
  await step('make a link and see it first in the list', async () => {
    await create(page, { 'Long address': 'https://example.com/older', Code: 'older' })
    await create(page, { 'Long address': target, Code: 'first', Title: 'My first' })
    assert.equal(page.url(), OPEN + '/?made=first')
    await check(page, 'start page with a new link')
    assert.equal(await page.locator('.made a').innerText(), OPEN + '/first')
    const top = await page.locator('.links li').first().innerText()
    assert.match(top, /^first\s+0 clicks\s+My first\s/)
    assert.match(top, /\d{4}-\d\d-\d\d \d\d:\d\d UTC \(just now\)/)
  })
  await step('copy it', async () => {
    await page.context().grantPermissions(['clipboard-read', 'clipboard-write'])
    await page.getByRole('button', { name: 'Copy' }).click()
    await page.getByRole('button', { name: 'Copied' }).waitFor()
    assert.equal(await page.evaluate(() => navigator.clipboard.readText()), OPEN + '/first')
  })
  await step('follow it', async () => {
    await page.locator('.made a').click()
    assert.equal(page.url(), target)
  })
  await step('look at its chart', async () => {
    await visit(page, OPEN + '/first+', 200, 'page of a link')
    assert.equal(await page.locator('.count').innerText(), '1')
    await page.getByRole('img', { name: 'Clicks per day' }).waitFor()
    assert.ok((await page.locator('.chart path').boundingBox()).height > 100)
    await page.getByText('The same as a table').click()
    assert.match(await page.locator('figure table').innerText(), /\d{4}-\d\d-\d\d\s+1$/)
  })
  await step('a taken code is said beside its field, and nothing typed is lost', async () => {
    await visit(page, OPEN + '/', 200, 'start page')
    await create(page, { 'Long address': target, Code: 'first', Title: 'Again' })
    await check(page, 'form with an error')
    assert.equal(await field(page, 'Title').inputValue(), 'Again')
    assert.equal((await focused(page)).text, 'Code optional')
    const described = await field(page, 'Code').getAttribute('aria-describedby')
    assert.match(await page.locator('#' + described).innerText(), /given out before/)
  })
  await step('disable it and get the not-found page', async () => {
    await visit(page, OPEN + '/?q=first', 200, 'search')
    await page.getByRole('button', { name: 'Disable first' }).click()
    assert.match(page.url(), /\?q=first#link-\d+$/)
    assert.match(await row(page, 'first').innerText(), /disabled/)
    await visit(page, OPEN + '/first', 404, 'not-found page')
    await page.getByRole('link', { name: 'Go to the start page' }).click()
    assert.equal(page.url(), OPEN + '/')
  })
  await step('enable and delete it', async () => {
    await page.getByRole('button', { name: 'Enable first' }).click()
    await row(page, 'first').getByRole('link', { name: 'first' }).click()
    assert.equal(page.url(), target)
    await visit(page, OPEN + '/', 200, 'start page')
    await row(page, 'first').getByText('Delete', { exact: true }).click()
    await row(page, 'first').getByRole('button', { name: 'Delete for good' }).click()
    assert.match(page.url(), /#links$/)
    assert.equal(await row(page, 'first').count(), 0)
    await visit(page, OPEN + '/first', 404, 'not-found page')
  })
  await page.context().close()
}

async function keyboard (browser) {
  const page = await openPage(browser)
  await step('everything by keyboard alone', async () => {
    await visit(page, OPEN + '/', 200, 'start page')
    await tabTo(page, 'Long address')
    await page.keyboard.type('https://example.com/typed')
    await tabTo(page, 'Code')
    await page.keyboard.type('typed')
    await press(page, 'Enter')
    await page.waitForURL(/made=typed/)
    await tabTo(page, 'Disable typed')
    await press(page, 'Enter')
    await page.waitForURL(/#link-/)
    assert.match(await row(page, 'typed').innerText(), /disabled/)
    await tabTo(page, 'Delete typed')
    await press(page, 'Enter')
    await tabTo(page, 'Delete for good')
    await press(page, 'Space')
    await page.waitForURL(/#links/)
    assert.equal(await row(page, 'typed').count(), 0)
    await tabTo(page, 'Code, address or title')
    await page.keyboard.type('older')
    await press(page, 'Enter')
    await page.waitForURL(/q=older/)
    assert.equal(await page.locator('.links li').count(), 1)
  })
  await page.context().close()
}

async function attacks (browser) {
  const page = await openPage(browser)
  await step('an attack in title, target and referrer is text', async () => {
    await visit(page, OPEN + '/', 200, 'start page')
    await create(page, {
      'Long address': 'https://example.com/?' + attack, Code: 'evil', Title: attack
    })
    for (const address of ['/?made=evil', '/?q=' + encodeURIComponent(attack), '/evil+']) {
      await visit(page, OPEN + address, 200, 'page with an attack')
      assert.ok((await page.locator('main').innerText()).includes('?' + attack))
      assert.ok((await page.locator('main').innerText()).split(attack).length > 2)
    }
    await visit(page, OPEN + '/attacked+', 200, 'page with an attack')
    assert.ok((await page.locator('table').last().innerText()).includes(attack))
    const filled = `/?url=${encodeURIComponent(attack)}&title=${encodeURIComponent(attack)}`
    await visit(page, OPEN + filled, 200, 'page with an attack')
    assert.equal(await field(page, 'Title').inputValue(), attack)
    assert.equal(await page.locator('main script').count(), 1) // the copy buttons'
    assert.deepEqual(page.errors, [])
  })
  await page.context().close()
}

async function lists (browser, site) {
  const page = await openPage(browser)
  await step('long lists go on', async () => {
    await visit(page, OPEN + '/', 200, 'start page')
    const first = await page.locator('.links li').count()
    assert.equal(first, 20)
    await page.getByRole('link', { name: 'Older links' }).click()
    await page.getByText('Newest links').waitFor()
    assert.equal(await page.getByText('Older links').count(), 0)
  })
  await step('search and state', async () => {
    await page.getByLabel('Code, address or title').fill('NOTES/1')
    await page.getByLabel('State').selectOption('Disabled')
    await page.getByRole('button', { name: 'Search' }).click()
    await check(page, 'search')
    assert.equal(await page.locator('.links li').count(), 2) // 10 and 15
    await visit(page, OPEN + '/?q=no+such+thing', 200, 'search without a result')
    await page.getByText('Show all links').click()
    assert.equal(await page.locator('.links li').count(), 20)
  })
  await step('the bookmark', async () => {
    await visit(page, OPEN + '/', 200, 'start page')
    const line = await page.locator('details code').textContent()
    await page.goto(site + '/a page?x=1&y=2')
    await page.evaluate(line.replace('javascript:', ''))
    await page.waitForURL(OPEN + '/?url=*')
    assert.equal(await field(page, 'Long address').inputValue(), site + '/a%20page?x=1&y=2')
    assert.equal(await field(page, 'Title').inputValue(), 'elsewhere')
  })
  await page.context().close()

  const plain = await openPage(browser, { javaScriptEnabled: false })
  await step('without scripts', async () => {
    await plain.goto(OPEN + '/')
    await create(plain, { 'Long address': 'example.com', Code: 'plain' })
    assert.equal(await plain.locator('.made a').innerText(), OPEN + '/plain')
    assert.equal(await plain.getByRole('button', { name: 'Copy' }).count(), 0)
  })
  await plain.context().close()
}

async function tokens (browser) {
  const stranger = await openPage(browser, { httpCredentials: guess })
  await step('with API_TOKEN, the start page asks for it', async () => {
    await visit(stranger, CLOSED + '/', 401, 'page that asks for a token')
    assert.doesNotMatch(await stranger.locator('body').innerText(), /Launch/)
  })
  await step('strangers see where a link leads, and no more', async () => {
    await visit(stranger, CLOSED + '/launch+', 200, 'page of a link for strangers')
    const text = await stranger.locator('main').innerText()
    assert.match(text, /https:\/\/www\.example\.com\/products/)
    assert.doesNotMatch(text, /Launch of|Created/)
    await stranger.getByRole('link', { name: 'Show its figures' }).click()
    await stranger.getByText('A token is needed').waitFor()
  })
  await stranger.context().close()

  const owner = await openPage(browser, {
    httpCredentials: { username: 'anybody', password: API_TOKEN }
  })
  await step('the browser’s own prompt lets its holder in', async () => {
    await visit(owner, CLOSED + '/launch+', 200, 'page of a link for strangers')
    await owner.getByRole('link', { name: 'Show its figures' }).click()
    await owner.getByText('Clicks per day').first().waitFor()
    await owner.goto(CLOSED + '/')
    await create(owner, { 'Long address': 'https://example.com/closed', Code: 'closed' })
    assert.equal(await owner.locator('.made a').innerText(), CLOSED + '/closed')
    await owner.getByRole('button', { name: 'Disable closed' }).click()
    assert.match(await row(owner, 'closed').innerText(), /disabled/)
    await check(owner, 'start page of who has the token')
  })
  return owner
}

// otherSites tries from a page of another site what such pages may do, and what not. owner is a
// window in which the token was given.
async function otherSites (owner, site) {
  const ask = (address, options) => owner.evaluate(async ([address, options]) => {
    try {
      const response = await fetch(address, options)
      const body = response.status === 204 ? null : await response.json()
      return { status: response.status, body, etag: response.headers.get('ETag') }
    } catch (error) {
      return { status: 0, body: String(error) }
    }
  }, [address, options])
  const bearer = { Authorization: 'Bearer ' + API_TOKEN }
  const form = { 'Content-Type': 'application/x-www-form-urlencoded' }
  const count = async () => (await ask(OPEN + '/urls?per_page=1000')).body.length

  await step('another site’s page may read', async () => {
    await owner.goto(site)
    assert.equal((await ask(OPEN + '/health')).body.status, 'ok')
    assert.equal((await ask(OPEN + '/openapi.json')).body.openapi, '3.1.0')
    assert.equal((await ask(OPEN + '/stats/launch')).body.short_code, 'launch')
    assert.equal((await ask(OPEN + '/stats/unknown')).body.error, 'not_found')
  })
  await step('with a token it may write', async () => {
    assert.equal((await ask(CLOSED + '/urls')).status, 401)
    const made = await ask(CLOSED + '/urls', {
      method: 'POST',
      headers: { ...bearer, 'Content-Type': 'application/json', 'Idempotency-Key': 'one' },
      body: JSON.stringify({ original_url: 'https://example.com/cors' })
    })
    assert.equal(made.status, 201)
    const at = CLOSED + '/urls/' + made.body.id
    const read = await ask(at, { headers: bearer })
    const changed = await ask(at, {
      method: 'PATCH', headers: { ...bearer, 'If-Match': read.etag }, body: '{"title":"From afar"}'
    })
    assert.equal(changed.body.title, 'From afar')
    assert.equal((await ask(at, { method: 'DELETE', headers: bearer })).status, 204)
  })
  await step('without one it may not', async () => {
    const before = await count()
    const body = 'url=https://example.com/'
    for (const hop of [OPEN, CLOSED]) {
      const refused = await ask(hop + '/shorten', { method: 'POST', headers: form, body })
      assert.equal(refused.status, 403)
      assert.equal(refused.body.error, 'cross_origin')
      // What it could never read: sent with the password that the browser remembers.
      await owner.evaluate(([address, headers, body]) => fetch(address, {
        method: 'POST', mode: 'no-cors', credentials: 'include', headers, body
      }), [hop + '/shorten', form, body])
      await owner.setContent(`<form method="post" action="${hop}/shorten">
        <input name="url" value="https://example.com/"><button>Send</button></form>`)
      await owner.getByRole('button').click()
      await owner.getByText('Not from another site').waitFor()
      await owner.goto(site)
    }
    assert.equal(await count(), before)
  })
  await owner.context().close()
}

// screenshots takes a picture of each page on a phone and on a desk, by day and by night.
async function screenshots (browser) {
  const shown = [
    ['start', '/', 200], ['made', '/?made=launch', 200], ['link', '/launch+', 200],
    ['million', '/million+', 200], ['new', '/evil+', 200], ['not-found', '/unknown', 404],
    ['nothing', '/?q=no+such+thing', 200]
  ]
  for (const colorScheme of ['light', 'dark']) {
    for (const width of [360, 1280]) {
      await step(`screenshots, ${colorScheme}, ${width} px`, async () => {
        const page = await openPage(browser, {
          colorScheme, viewport: { width, height: 800 }, httpCredentials: guess
        })
        const shoot = (name) => page.screenshot({
          path: path.join(OUT, `${name}-${width}-${colorScheme}.png`), fullPage: true
        })
        for (const [name, address, status] of shown) {
          await visit(page, OPEN + address, status, name)
          await shoot(name)
        }
        await visit(page, CLOSED + '/', 401, 'page that asks for a token')
        await shoot('token')
        await visit(page, CLOSED + '/launch+', 200, 'page of a link for strangers')
        await shoot('stranger')
        await page.goto(OPEN + '/')
        await create(page, { 'Long address': 'nope', Code: 'launch', Title: 'Launch, again' })
        await page.getByText('must be a URL').waitFor()
        await check(page, 'form with an error')
        await shoot('error')
        await page.context().close()
      })
    }
  }
}

// pictures takes the two pictures of the README, without the links of the steps before.
async function pictures (browser) {
  for (const code of ['closed', 'plain', 'evil', 'attacked', 'older']) {
    const { id } = await (await fetch(OPEN + '/stats/' + code)).json()
    await fetch(OPEN + '/urls/' + id, { method: 'DELETE' })
  }
  for (const [name, address, colorScheme] of [
    ['start', '/', 'light'], ['link', '/launch+', 'dark']
  ]) {
    const page = await openPage(browser, { colorScheme, viewport: { width: 1000, height: 1060 } })
    await visit(page, OPEN + address, 200, name)
    await page.screenshot({ path: path.join(OUT, `readme-${name}.png`) })
    await page.context().close()
  }
}

async function main () {
  fs.mkdirSync(OUT, { recursive: true })
  const server = await elsewhere()
  const site = 'http://127.0.0.1:' + server.address().port // hop's pages are on localhost
  const browser = await chromium.launch({ executablePath: '/usr/bin/chromium', args: flags })
  try {
    await usual(browser, site)
    await keyboard(browser)
    execFileSync(PSQL, ['-qX', '-v', 'ON_ERROR_STOP=1', '-f', path.join(__dirname, 'figures.sql'),
      DATABASE_URL])
    await attacks(browser)
    await lists(browser, site)
    const owner = await tokens(browser)
    await otherSites(owner, site)
    await screenshots(browser)
    await step('pictures of the README', () => pictures(browser))
  } finally {
    await browser.close()
    server.close()
  }
  for (const [name, bytes] of sizes) console.log(`${name}: ${bytes} bytes`)
  console.log(`axe looked ${looked} times and found nothing`)
}

main().catch((error) => {
  console.error(error)
  process.exit(1)
})

// answers.js OPENAPI ANSWERS: compares answers of hop, one JSON object a line as TestREST records
// them, with the API document, by ajv, a validator of JSON Schema 2020-12, OpenAPI 3.1's own. Of
// each answer: the route documents its status, its Content-Type and the headers it must have, and
// the body is as the schema says, with no member that the schema does not name. Of each request
// that succeeded: its JSON body is what the document allows to be sent.
'use strict'
const fs = require('fs')
const Ajv2020 = require('ajv/dist/2020').default
const addFormats = require('ajv-formats').default

const [documentName, answersName] = process.argv.slice(2)
const doc = JSON.parse(fs.readFileSync(documentName, 'utf8'))
const answers = fs.readFileSync(answersName, 'utf8').trim().split('\n').map((l) => JSON.parse(l))

// int64 is no format of JSON Schema, and "uri" refuses targets that browsers take.
const formats = { int64: true, uri: true, 'uri-reference': true }
const ajv = new Ajv2020({ allErrors: true, strict: false, formats })
addFormats(ajv, ['date'])
ajv.addSchema(doc, 'openapi.json')

// pointer is a place in the document as a JSON pointer.
function pointer (...keys) {
  return keys.map((k) => '/' + k.replaceAll('~', '~0').replaceAll('/', '~1')).join('')
}

// resolve follows the $ref of a place, if there is one, to the place it leads to.
function resolve (place) {
  const value = place.split('/').slice(1).reduce(
    (v, key) => v?.[key.replaceAll('~1', '/').replaceAll('~0', '~')], doc)
  if (value && value.$ref) return resolve(value.$ref.slice(1))
  return { place, value }
}

// problems are what ajv finds in a value against the schema at a place.
function problems (place, value) {
  const validate = ajv.getSchema('openapi.json#' + place)
  if (validate(value)) return []
  return validate.errors.map((e) => `${e.instancePath || 'body'} ${e.message}`)
}

// unnamed are the members of a value that the schema at a place names nowhere.
function unnamed (place, value, at = 'body') {
  const { place: here, value: schema } = resolve(place)
  if (Array.isArray(value) && schema.items) {
    return value.flatMap((v, i) => unnamed(here + '/items', v, `${at}[${i}]`))
  }
  if (value === null || typeof value !== 'object') return []
  const known = membersOf(here)
  if (known === null) return []
  return Object.keys(value).flatMap((name) => {
    if (!known.has(name)) return [`${at}.${name} is not documented`]
    return unnamed(known.get(name), value[name], `${at}.${name}`)
  })
}

// membersOf is where the members of an object are described, by name, or null if it may have any.
function membersOf (place) {
  const { place: here, value: schema } = resolve(place)
  if (schema.additionalProperties) return null
  const known = new Map()
  for (const name of Object.keys(schema.properties || {})) {
    known.set(name, here + pointer('properties', name))
  }
  (schema.allOf || []).forEach((_, i) => {
    for (const [name, where] of membersOf(`${here}/allOf/${i}`) || []) known.set(name, where)
  })
  return known
}

// headerOf is the first value of a header, whatever the case of its name.
function headerOf (answer, name) {
  const sent = Object.entries(answer.header).find(([n]) => n.toLowerCase() === name.toLowerCase())
  return sent && sent[1][0]
}

// judge says what is wrong with an answer.
function judge (answer) {
  if (answer.route === 'page') return [] // no part of the API
  let operation = pointer('x-unlisted')
  if (answer.route !== 'none') {
    const [method, path] = answer.route.split(' ')
    operation = pointer('paths', path, method.toLowerCase())
  }
  const { place, value: response } = resolve(`${operation}/responses/${answer.status}`)
  if (!response) return [`the status ${answer.status} is not documented`]
  const found = []
  for (const [name, header] of Object.entries(response.headers || {})) {
    const { place: where, value } = resolve(place + pointer('headers', name))
    const sent = headerOf(answer, name)
    if (!sent && value.required) found.push(`the header ${name} is missing`)
    if (!sent || !value.schema) continue
    const typed = value.schema.type === 'integer' ? Number(sent) : sent
    found.push(...problems(where + '/schema', typed).map((p) => `header ${name}: ${p}`))
  }
  const type = (headerOf(answer, 'Content-Type') || '').split(';')[0]
  if (answer.body === '') return found // also of a HEAD
  if (!response.content || !response.content[type]) {
    return [...found, `the Content-Type ${type || '(none)'} is not documented`]
  }
  if (type !== 'application/json') return found
  const schema = place + pointer('content', type, 'schema')
  const body = JSON.parse(answer.body)
  return [...found, ...problems(schema, body), ...unnamed(schema, body)]
}

// judgeRequest says what is wrong with the JSON body of a request that succeeded.
function judgeRequest (answer) {
  if (answer.status >= 300 || !answer.route.includes(' ')) return []
  if (!/^\s*[{[]/.test(answer.request)) return [] // a form, a file, nothing
  const [method, path] = answer.route.split(' ')
  const place = pointer('paths', path, method.toLowerCase(), 'requestBody', 'content',
    'application/json', 'schema')
  const body = JSON.parse(answer.request)
  const sent = Array.isArray(body)
    ? body.filter((_, i) => JSON.parse(answer.body).results[i].status === 201) // what was taken
    : body
  if (Array.isArray(sent) && sent.length === 0) return []
  return problems(place, sent).map((p) => `the request succeeded, but ${p}`)
}

let bad = 0
for (const answer of answers) {
  for (const problem of [...judge(answer), ...judgeRequest(answer)]) {
    bad++
    console.error(`${answer.case}: ${answer.route} ${answer.status}: ${problem}`)
  }
}
console.log(`ajv: ${answers.length} answers, ${bad} findings`)
process.exit(bad === 0 && answers.length > 0 ? 0 : 1)

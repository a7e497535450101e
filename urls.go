package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"time"
)

// Links: POST /shorten, and the resource /urls.

// answered is a link as writes answer it.
type answered struct {
	link
	ShortURL string `json:"short_url,omitempty"`
	Cache    string `json:"cache,omitempty"` // pending: see Cache.change
}

// creation is one link on its way through the queue.
type creation struct {
	link newLink
	done chan made
}

// handleShorten makes a link for anybody.
func (s *Server) handleShorten(w http.ResponseWriter, r *http.Request) error {
	m, err := s.createLink(w, r, false)
	return respond(w, http.StatusCreated, m.answer(s.cfg.BaseURL), err)
}

// handleCreateLink makes a link for a user.
func (s *Server) handleCreateLink(w http.ResponseWriter, r *http.Request) error {
	m, err := s.createLink(w, r, true)
	return respond(w, http.StatusCreated, m.answer(""), err)
}

// answer is m for the client, with its short URL if base is given.
func (m made) answer(base string) answered {
	a := answered{link: m.link}
	if base != "" {
		a.ShortURL = base + "/" + m.link.ShortCode
	}
	if m.pending {
		a.Cache = "pending"
	}
	return a
}

// createLink makes the link that a body asks for. It travels with others: concurrent creates share a statement and a commit.
func (s *Server) createLink(w http.ResponseWriter, r *http.Request, needsUser bool) (made, error) {
	f, err := readFields(w, r)
	if err != nil {
		return made{}, err
	}
	l := s.readLink(f, needsUser)
	if err := f.err(); err != nil {
		return made{}, err
	}
	c := &creation{l, make(chan made, 1)}
	s.queue <- c // has room for all whom the limit lets in
	timeout := time.NewTimer(answerWithin)
	defer timeout.Stop()
	select {
	case m := <-c.done:
		return m, m.err
	case <-timeout.C:
		return made{}, errUnavailable
	}
}

// readLink takes a new link out of a body. The field names are those of three generations of clients.
func (s *Server) readLink(f *fields, needsUser bool) newLink {
	name := func(names ...string) string {
		for _, n := range names {
			if !f.null(n) {
				return n
			}
		}
		return names[0]
	}
	return newLink{
		userID:  f.id("user_id", needsUser),
		url:     f.text(name("original_url", "long_url", "url"), true, s.rules.check),
		code:    f.text(name("custom_code", "short_code"), false, checkCode),
		title:   f.text("title", false, checkText),
		expires: f.future("expires_at", time.Now()),
	}
}

// createQueued makes queued links, all that gathered during one commit in the next. There is one: two would commit half as many
// each, and made 0.68 of what pgbench does, one 0.84.
func (s *Server) createQueued() {
	for first := range s.queue {
		batch := drain(s.queue, first, batchSize)
		links := make([]newLink, len(batch))
		for i, c := range batch {
			links[i] = c.link
		}
		for i, m := range s.makeLinks(links) {
			batch[i].done <- m
		}
	}
}

// makeLinks makes what it can of links, giving codes to those without. Codes are never looked up first: a taken random one is
// tried again with another, a few times; after that the space would have to be nearly full.
func (s *Server) makeLinks(links []newLink) []made {
	results, todo, refusal := make([]made, len(links)), make([]int, len(links)), errCodeTaken
	if s.store.down.Load() { // a hold now would take a known link, whose code a client tries, out of every cache
		todo, refusal = nil, errUnavailable
	}
	for i := range todo {
		todo[i] = i
	}
	for i := range results {
		results[i].err = refusal // unless a round reaches it; what none does repeats a custom code of its own request
	}
	for round := 0; round < 4 && len(todo) > 0; round++ {
		var batch []newLink
		var codes []string
		var at, later []int
		seen, tell := map[string]bool{}, s.cache.create
		for _, i := range todo {
			l := links[i]
			if l.code != "" {
				tell = s.cache.change
			}
			for l.code == "" || reserved[l.code] {
				l.code = newCode()
			}
			if seen[l.code] {
				later = append(later, i)
				continue
			}
			seen[l.code] = true
			batch, codes, at = append(batch, l), append(codes, l.code), append(at, i)
		}
		var answers []made
		pending, err := tell(codes, func() (err error) { answers, err = s.store.createLinks(batch); return err })
		for n, i := range at {
			switch {
			case err != nil:
				results[i] = made{err: err}
			case answers[n].err == errCodeTaken && links[i].code == "":
				results[i].err = errUnavailable
				later = append(later, i)
			default:
				results[i] = answers[n]
				results[i].pending = pending
			}
		}
		todo = later
	}
	return results
}

// bulkResult is what became of one link of a bulk request: its status, and the link or the error.
type bulkResult struct {
	Status int       `json:"status"`
	URL    *answered `json:"url,omitempty"`
	*apiError
}

// handleBulk makes up to maxBulk links in one statement, each for itself: a bad one does not stop the others.
func (s *Server) handleBulk(w http.ResponseWriter, r *http.Request) error {
	var items []json.RawMessage
	if err := readJSON(w, r, maxBulkBody, &items); err != nil {
		return err
	}
	if len(items) == 0 || len(items) > maxBulk {
		return &apiError{http.StatusBadRequest, "invalid_request", fmt.Sprintf("the body must be an array of 1 to %d links", maxBulk), nil}
	}
	results := make([]bulkResult, len(items))
	refuse := func(i int, err error) {
		api := asAPIError(err)
		results[i] = bulkResult{api.status, nil, api}
	}
	var links []newLink
	var at []int
	for i, item := range items {
		f := &fields{problems: map[string]string{}}
		if json.Unmarshal(item, &f.raw) != nil || f.raw == nil {
			f.refuse("item", "must be a JSON object")
		}
		l := s.readLink(f, r.Pattern == "POST /urls/bulk")
		if err := f.err(); err != nil {
			refuse(i, err)
			continue
		}
		links, at = append(links, l), append(at, i)
	}
	for n, m := range s.makeLinks(links) {
		if m.err != nil {
			refuse(at[n], m.err)
			continue
		}
		a := m.answer(s.cfg.BaseURL)
		results[at[n]] = bulkResult{http.StatusCreated, &a, nil}
	}
	return respond(w, http.StatusOK, map[string]any{"results": results}, nil)
}

// handleListLinks lists links by user_id, is_active or short_code.
func (s *Server) handleListLinks(w http.ResponseWriter, r *http.Request) error {
	q := newQuery(r)
	p := q.page()
	f := filter{conds: []string{"deleted_at IS NULL"}}
	q.filterInt(&f, "user_id")
	if q.values.Has("is_active") {
		active, err := strconv.ParseBool(q.values.Get("is_active"))
		if err != nil {
			q.refuse("is_active", "must be true or false")
		}
		f.and("is_active = ?", active)
	}
	if q.values.Has("short_code") {
		code := q.values.Get("short_code")
		if !validCode(code) {
			q.refuse("short_code", "is no short code")
		}
		f.and("short_code = ?", code)
	}
	if err := q.err(); err != nil {
		return err
	}
	links, err := list(s.store, "urls", linkCols, f, p, linkDest)
	return writeList(w, r, links, p, err, func(l link) int64 { return l.ID })
}

// handleGetLink answers one link.
func (s *Server) handleGetLink(w http.ResponseWriter, r *http.Request) error {
	l, err := s.store.link(pathID(r))
	return respond(w, http.StatusOK, l, err)
}

// handleUpdateLink changes a link, here and in every cache, before it answers.
func (s *Server) handleUpdateLink(w http.ResponseWriter, r *http.Request) error {
	f, err := readFields(w, r)
	if err != nil {
		return err
	}
	var ch linkChange
	if f.has("original_url") {
		ch.url = new(f.text("original_url", true, s.rules.check))
	}
	if f.has("is_active") {
		ch.active = new(f.flag("is_active"))
	}
	if f.has("title") {
		ch.title = new(f.text("title", false, checkText))
	}
	ch.expires, ch.expiring = f.future("expires_at", time.Now()), f.has("expires_at")
	if ch == (linkChange{}) {
		f.refuse("body", "must have original_url, title, is_active or expires_at")
	}
	if err := f.err(); err != nil {
		return err
	}
	m, err := s.changeLink(r, func(id int64) (link, error) { return s.store.updateLink(id, ch) })
	return respond(w, http.StatusOK, m.answer(""), err)
}

// handleDeleteLink hides a link for good.
func (s *Server) handleDeleteLink(w http.ResponseWriter, r *http.Request) error {
	m, err := s.changeLink(r, func(id int64) (link, error) { return link{}, s.store.deleteLink(id) })
	if m.pending {
		w.Header().Set("X-Cache", "pending") // a 204 has no body to say it in
	}
	return respond(w, http.StatusNoContent, nil, err)
}

// changeLink does commit to the link of the path and to every cache.
func (s *Server) changeLink(r *http.Request, commit func(id int64) (link, error)) (m made, err error) {
	id := pathID(r)
	l, err := s.store.link(id)
	if err != nil {
		return m, err
	}
	m.pending, err = s.cache.change([]string{l.ShortCode}, func() (err error) { m.link, err = commit(id); return err })
	return m, err
}

// pathID is the {id} of a path; what is no positive integer is 0, which no row has.
func pathID(r *http.Request) int64 {
	id, err := strconv.ParseInt(r.PathValue("id"), 10, 64)
	if err != nil {
		return 0
	}
	return id
}

// writeList answers one page, and says in a Link header (RFC 8288) where the next one starts.
func writeList[T any](w http.ResponseWriter, r *http.Request, rows []T, p page, err error, id func(T) int64) error {
	if len(rows) > p.limit {
		rows = rows[:p.limit]
		q := r.URL.Query()
		q.Del("page")
		q.Set("after", strconv.FormatInt(id(rows[p.limit-1]), 10))
		w.Header().Set("Link", "<"+r.URL.Path+"?"+q.Encode()+`>; rel="next"`)
	}
	return respond(w, http.StatusOK, rows, err)
}

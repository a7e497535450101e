package main

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"time"
)

// Links: POST /shorten, the resource /urls, and /stats.

// answeredLink is a link as writes answer it.
type answeredLink struct {
	link
	ShortURL string `json:"short_url,omitempty"`
	Cache    string `json:"cache,omitempty"` // pending: Redis could not be told of the change
}

// answered is l for the client. pending says that other replicas learn of it by their next poll.
func answered(l link, pending bool) answeredLink {
	a := answeredLink{link: l}
	if pending {
		a.Cache = "pending"
	}
	return a
}

// shortURL is what people click on to follow a code.
func (s *Server) shortURL(code string) string { return s.cfg.BaseURL + "/" + code }

// ---- making links ----

// handleShorten makes a link and answers its short URL: in JSON, or alone to who takes plain text.
func (s *Server) handleShorten(w http.ResponseWriter, r *http.Request) error {
	made, err := s.createPosted(w, r)
	if err != nil {
		return err
	}
	if prefers(r, "text/plain") {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		w.WriteHeader(http.StatusCreated)
		w.Write([]byte(s.shortURL(made.ShortCode) + "\n")) // an error means that the client is gone
		return nil
	}
	made.ShortURL = s.shortURL(made.ShortCode)
	w.Header().Set("ETag", made.etag())
	return writeJSON(w, http.StatusCreated, made)
}

// handleCreateLink makes a link.
func (s *Server) handleCreateLink(w http.ResponseWriter, r *http.Request) error {
	made, err := s.createPosted(w, r)
	if err != nil {
		return err
	}
	w.Header().Set("ETag", made.etag())
	return writeJSON(w, http.StatusCreated, made)
}

// createPosted makes the link that the body of a request asks for.
func (s *Server) createPosted(w http.ResponseWriter, r *http.Request) (answeredLink, error) {
	f, err := readFieldsOrForm(w, r)
	if err != nil {
		return answeredLink{}, err
	}
	return s.createLink(r, f)
}

// createLink makes the link that a body asks for. It travels with others: creates of one moment
// share a statement and a commit. One that is alone waits for nobody.
func (s *Server) createLink(r *http.Request, f *fields) (answeredLink, error) {
	l := s.readLink(f)
	s.readKey(r, f, &l)
	if err := f.err(); err != nil {
		return answeredLink{}, err
	}
	c := &creation{link: l, done: make(chan createResult, 1)}
	select {
	case s.creates <- c:
	default:
		return answeredLink{}, errOverloaded
	}
	ctx, cancel := context.WithTimeout(r.Context(), answerWithin)
	defer cancel()
	select {
	case made := <-c.done:
		if l.keyed && errors.Is(made.err, errCodeTaken) {
			made.link, made.err = s.madeBefore(ctx, l)
		}
		return answered(made.link, made.pending), made.err
	case <-ctx.Done():
		c.gone.Store(true)
		return answeredLink{}, errUnavailable
	}
}

// readLink takes a new link out of a body.
func (s *Server) readLink(f *fields) newLink {
	l := newLink{
		userID:  f.id("user_id", false),
		url:     f.target(f.targetName(), true, s.rules),
		code:    f.text(f.codeName(), false, checkCode),
		title:   f.text("title", false, checkText),
		expires: f.future("expires_at", time.Now()),
	}
	l.custom = l.code != ""
	if active := f.flagOrNull("is_active"); active != nil {
		l.inactive = !*active
	}
	return l
}

// createQueued makes queued links for ever: all that gathered during one commit in the next. There
// is one such goroutine: two would commit half as many each.
func (s *Server) createQueued() {
	for first := range s.creates {
		batch := takeQueued(s.creates, first, batchSize)
		batch = slices.DeleteFunc(batch, func(c *creation) bool { return c.gone.Load() })
		links := make([]newLink, len(batch))
		for i, c := range batch {
			links[i] = c.link
		}
		for i, result := range s.createLinks(context.Background(), links) {
			batch[i].done <- result
		}
	}
}

// attempt is a link to be made, and what became of it so far.
type attempt struct {
	link   newLink
	result createResult
}

// createRounds is how often a link gets another random code when the first is taken. Three misses
// in a row mean that the codes are nearly used up.
const createRounds = 4

// createLinks makes what it can of links. Nobody looks whether a code is free: the insert says so.
func (s *Server) createLinks(ctx context.Context, links []newLink) []createResult {
	attempts := make([]attempt, len(links))
	open := make([]*attempt, len(links))
	for i, l := range links {
		attempts[i].link = l
		open[i] = &attempts[i]
	}
	for round := 0; round < createRounds && len(open) > 0; round++ {
		open = s.tryLinks(ctx, open)
	}
	results := make([]createResult, len(links))
	for i := range attempts {
		results[i] = attempts[i].result
	}
	return results
}

// tryLinks makes the links of open in one commit, and returns those that need another round: a
// random code that was taken, and a code that is asked for twice.
func (s *Server) tryLinks(ctx context.Context, open []*attempt) (again []*attempt) {
	var batch []*attempt
	var links []newLink
	seen := map[string]bool{}
	for _, a := range open {
		l := a.link
		if l.code == "" {
			l.code = newCode()
		}
		if seen[l.code] {
			a.result.err = errCodeTaken // unless the next round finds it free after all
			again = append(again, a)
			continue
		}
		seen[l.code] = true
		batch = append(batch, a)
		links = append(links, l)
	}
	results, err := s.store.createLinks(ctx, links)
	if err != nil {
		for _, a := range open {
			a.result = createResult{err: err}
		}
		return nil
	}
	var made []string // codes that somebody may have asked for before
	for i, a := range batch {
		a.result = results[i]
		switch {
		case results[i].err == nil && a.link.custom:
			made = append(made, links[i].code)
		case results[i].err == errCodeTaken && a.link.code == "":
			a.result.err = errUnavailable
			again = append(again, a)
		}
	}
	pending := s.cache.created(made)
	for _, a := range batch {
		a.result.pending = pending && a.link.custom && a.result.err == nil
	}
	return again
}

// bulkResult is what became of one link of a bulk request.
type bulkResult struct {
	Status int           `json:"status"`
	URL    *answeredLink `json:"url,omitempty"`
	*apiError
}

// maxBodies is how many bytes of bulk requests may be in memory: 8 of the largest, hundreds of
// usual ones.
const maxBodies = 8 * maxBulkBody

// handleBulkLinks makes up to maxBulk links in one commit, each for itself: a bad one does not stop
// the others.
func (s *Server) handleBulkLinks(w http.ResponseWriter, r *http.Request) error {
	if r.Header.Get(keyHeader) != "" {
		return badRequest("invalid_request", keyHeader+" is for one link: give items a custom_code")
	}
	body := &countedBody{ReadCloser: r.Body, places: &s.bodies}
	defer body.release()
	r.Body = body
	items, err := readItems(w, r)
	if err != nil {
		return err
	}
	results := make([]bulkResult, len(items))
	var links []newLink
	var positions []int // of links in items
	for i, item := range items {
		l, err := s.readItem(item)
		if err != nil {
			results[i] = refusedItem(err)
			continue
		}
		links = append(links, l)
		positions = append(positions, i)
	}
	ctx, cancel := context.WithTimeout(r.Context(), bulkWithin)
	defer cancel()
	if err := s.createItems(ctx, links, positions, results); err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, map[string]any{"results": results})
}

// createItems makes links and puts what became of each into results, at its position. When the
// database could make none of them, the whole request failed: it may be tried again as it is.
func (s *Server) createItems(ctx context.Context, links []newLink, positions []int,
	results []bulkResult) error {

	notMade := 0
	var busy error
	for i, made := range s.createLinks(ctx, links) {
		if isBusy(made.err) {
			busy = made.err
			notMade++
		}
		if made.err != nil {
			results[positions[i]] = refusedItem(made.err)
			continue
		}
		a := answered(made.link, made.pending)
		a.ShortURL = s.shortURL(a.ShortCode)
		results[positions[i]] = bulkResult{Status: http.StatusCreated, URL: &a}
	}
	if busy != nil && notMade == len(links) { // not when there was nothing to make
		return busy
	}
	return nil
}

// readItem takes a new link out of one item of a bulk body.
func (s *Server) readItem(item []byte) (newLink, error) {
	f := itemFields(item)
	l := s.readLink(f)
	return l, f.err()
}

// refusedItem is the result of an item that made no link.
func refusedItem(err error) bulkResult {
	api := asAPIError(err)
	return bulkResult{Status: api.status, apiError: api}
}

// ---- reading links ----

// handleListLinks lists links by owner, state, code or target.
func (s *Server) handleListLinks(w http.ResponseWriter, r *http.Request) error {
	q := newQuery(r)
	p := q.page()
	filter := linkFilter{
		userID:      q.id("user_id"),
		active:      q.flag("is_active"),
		code:        q.text("short_code", checkListedCode),
		originalURL: q.text("original_url", checkSearch),
		search:      q.text("q", checkSearch),
		sort:        q.sort(),
	}
	if err := q.err(); err != nil {
		return err
	}
	ctx, cancel := s.store.forOneAnswer(r.Context())
	defer cancel()
	if filter.sort == byClicks {
		if err := s.clicks.sync(ctx); err != nil {
			return err
		}
	}
	found, err := s.store.listLinks(ctx, filter, p)
	if err != nil {
		return err
	}
	skip := p.offset + len(found.rows)
	switch {
	case found.more && filter.sort == byClicks && skip%p.limit == 0:
		s.linkNext(w, r, "page", int64(skip/p.limit+1))
	case found.more && filter.sort == byClicks:
		s.linkNext(w, r, "skip", int64(skip)) // the page ended early: see maxListed
	case found.more:
		s.linkNext(w, r, "after", found.lastID())
	case found.stopped != 0:
		// The search has looked at as many links as one answer may: it goes on from there.
		w.Header().Set("X-Search-Stopped", strconv.FormatInt(found.stopped, 10))
		s.linkNext(w, r, "after", found.stopped)
	}
	return writeRows(s, w, found.rows)
}

// checkListedCode refuses what no link can have as its code.
func checkListedCode(s string) error {
	if !validCode(s) {
		return errors.New("is no short code")
	}
	return nil
}

// sort takes the order of a list of links.
func (q *query) sort() linkSort {
	text, _ := q.get("sort")
	switch text {
	case "", "id", "created":
		return byID
	case "-created", "-id":
		return byNewest
	case "-clicks":
		return byClicks
	}
	q.refuse("sort", "must be created, -created or -clicks")
	return byID
}

// linkNext says in a Link header (RFC 8288) where a list goes on: at the same URL, with one
// parameter set. page and skip count from after on.
func (s *Server) linkNext(w http.ResponseWriter, r *http.Request, name string, value int64) {
	q := r.URL.Query()
	q.Del("page")
	q.Del("skip")
	q.Set(name, strconv.FormatInt(value, 10))
	next := url.URL{Path: s.cfg.BasePath() + r.URL.Path, RawQuery: q.Encode()}
	w.Header().Set("Link", "<"+next.String()+`>; rel="next"`)
}

// writeList answers one page of a list in id order.
func writeList[T listable](s *Server, w http.ResponseWriter, r *http.Request,
	found listed[T]) error {

	if found.more {
		s.linkNext(w, r, "after", found.lastID())
	}
	return writeRows(s, w, found.rows)
}

// maxUnread is how many bytes of lists may wait in memory until their clients have read them. One
// who does not read is disconnected after writeWithin; until then 32 of the heaviest pages fit, or
// 200 usual ones.
const maxUnread = 64 << 20

// writeRows answers with the rows of a list. They are encoded one by one into the one buffer that
// is sent, and are garbage when the client begins to read.
func writeRows[T listable](s *Server, w http.ResponseWriter, rows []T) error {
	weight := len("[]\n")
	for _, row := range rows {
		weight += row.weight()
	}
	if !s.unread.enterAll(int64(weight)) {
		w.Header().Del("Link")
		w.Header().Del("X-Search-Stopped")
		return errOverloaded
	}
	defer s.unread.leaveAll(int64(weight))
	var text bytes.Buffer
	text.Grow(weight)
	text.WriteByte('[')
	for i, row := range rows {
		if i > 0 {
			text.WriteByte(',')
		}
		writeJSONText(&text, row)
	}
	text.WriteString("]\n")
	return sendJSON(w, http.StatusOK, text.Bytes())
}

// handleGetLink answers one link.
func (s *Server) handleGetLink(w http.ResponseWriter, r *http.Request) error {
	l, err := s.store.link(r.Context(), pathID(r))
	if err != nil {
		return err
	}
	w.Header().Set("ETag", l.etag())
	if isKnown(r, l) {
		w.Header().Set("Cache-Control", askAgain)
		shareAnswer(w.Header())
		w.WriteHeader(http.StatusNotModified)
		return nil
	}
	return writeJSON(w, http.StatusOK, l)
}

// handleStats answers a link's figures. Every redirect that was answered before is in them.
func (s *Server) handleStats(w http.ResponseWriter, r *http.Request) error {
	code := r.PathValue("code")
	if !validCode(code) {
		return errNotFound
	}
	ctx, cancel := s.store.forOneAnswer(r.Context())
	defer cancel()
	if err := s.clicks.sync(ctx); err != nil {
		return err
	}
	st, err := s.store.stats(ctx, code)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, st)
}

// ---- changing links ----

// handleUpdateLink changes a link and answers it.
func (s *Server) handleUpdateLink(w http.ResponseWriter, r *http.Request) error {
	f, err := readFieldsOrForm(w, r)
	if err != nil {
		return err
	}
	after, err := s.changeLink(r, f)
	if err != nil {
		return err
	}
	w.Header().Set("ETag", after.etag())
	return writeJSON(w, http.StatusOK, after)
}

// changeLink changes the link of r's path as f says, here and in every cache, before it returns.
func (s *Server) changeLink(r *http.Request, f *fields) (answeredLink, error) {
	now := time.Now()
	_, err := s.readChange(f, link{}, now) // what is wrong in itself is said before any look-up
	if err != nil && !f.onlyRefused(f.targetName()) {
		return answeredLink{}, err
	}
	f.problems = problems{} // a target that the rules refuse by now may still stay as it is
	ctx, cancel := s.store.forOneAnswer(r.Context())
	defer cancel()
	id := pathID(r)
	before, err := s.store.link(ctx, id)
	if err != nil {
		return answeredLink{}, err
	}
	if err := checkMatch(r, before); err != nil { // and again below, where nobody can come between
		return answeredLink{}, err
	}
	var after link
	pending, err := s.cache.change(before.ShortCode, func() error {
		after, err = s.store.updateLink(ctx, id, func(old link) (linkChange, error) {
			if err := checkMatch(r, old); err != nil {
				return linkChange{}, err
			}
			return s.readChange(f, old, now)
		})
		return err
	})
	return answered(after, pending), err
}

// readChange takes a change of old out of a body. With the zero link it only judges the body by
// itself. What GET gave may be sent back whole.
func (s *Server) readChange(f *fields, old link, now time.Time) (linkChange, error) {
	var change linkChange
	target := f.targetName()
	if f.has(target) {
		change.url = new(f.target(target, true, s.rules))
		if *change.url == old.OriginalURL {
			delete(f.problems, target) // it stands already, whatever the rules say by now
		}
	}
	if f.has("title") {
		change.title = new(f.text("title", false, checkText))
	}
	change.active = f.flag("is_active")
	change.expires = f.expiry("expires_at", old.ExpiresAt, now)
	if old.ID != 0 {
		f.unchanged("id", old.ID)
		f.unchanged("short_code", old.ShortCode)
		f.unchanged("custom_code", old.ShortCode)
		f.unchanged("user_id", old.UserID)
		f.unchanged("created_at", old.CreatedAt)
	}
	if !f.hasAny(target, "title", "is_active", "expires_at") {
		f.refuse("body", "must have original_url, title, is_active or expires_at")
	}
	return change, f.err()
}

// handleDeleteLink deletes a link.
func (s *Server) handleDeleteLink(w http.ResponseWriter, r *http.Request) error {
	pending, err := s.removeLink(r)
	if err != nil {
		return err
	}
	if pending {
		w.Header().Set("X-Cache", "pending") // a 204 has no body to say it in
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// removeLink hides the link of r's path for good, here and in every cache, before it returns.
func (s *Server) removeLink(r *http.Request) (pending bool, err error) {
	ctx, cancel := s.store.forOneAnswer(r.Context())
	defer cancel()
	id := pathID(r)
	before, err := s.store.link(ctx, id)
	if err != nil {
		return false, err
	}
	if err := checkMatch(r, before); err != nil { // and again below, where nobody can come between
		return false, err
	}
	return s.cache.change(before.ShortCode, func() error {
		_, err := s.store.deleteLink(ctx, id, func(l link) error { return checkMatch(r, l) })
		return err
	})
}

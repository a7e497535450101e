package main

import (
	"encoding/json"
	"errors"
	"html/template"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// The pages that people see: / makes and lists links, /{code}+ tells where one leads and how many
// followed it. Their forms go to the API's own routes. How pages are written is in html.go.

// How much of a text stranger a list shows: pages stay small whatever links hold.
const (
	listedLinks  = 20 // a page of the list
	listedTarget = 80 // characters
	listedTitle  = 60 // characters
)

// ---- the start page ----

// homePage is what the template home shows.
type homePage struct {
	frame
	MayWrite    bool
	Bookmarklet template.URL
	Form        linkForm
	Made        *listedLink // the link that was made a moment ago
	List        *linkList   // nil: only the form
}

// linkForm is the form that makes a link, with what was typed and what is wrong with it.
type linkForm struct {
	Problem                      string // with no field in particular
	Target, Code, Title, Expires formField
}

// formField is a field of linkForm.
type formField struct {
	ID      string // in the page
	Value   string
	Problem string
}

// linkList is a page of the list of links.
type linkList struct {
	Query    string
	States   []stateChoice
	Links    []listedLink
	Here     string // the query string that leads here
	Next     string // the address of older links, if there are any
	Stopped  bool   // the search gave up before it had a full page
	Filtered bool
	Paged    bool // newer links come before these
}

// stateChoice is a choice of the filter for states.
type stateChoice struct {
	Value, Text string
	Chosen      bool
}

// listedLink is a link in the list.
type listedLink struct {
	ID       int64
	Code     string
	ShortURL string
	Name     string // its title
	Target   string
	Clicks   int64
	Active   bool
	State    string // why it leads nowhere, or ""
	Created  moment
	MayWrite bool
}

// handleHome shows the form that makes links, and the newest links. The query string may fill in
// the form, and choose among the links as that of GET /urls does.
func (s *Server) handleHome(w http.ResponseWriter, r *http.Request) error {
	if s.cfg.HomeURL != "" {
		w.Header().Set("Location", s.cfg.HomeURL)
		w.WriteHeader(http.StatusFound)
		return nil
	}
	if !takesPages(r) {
		return errNotFound
	}
	if err := s.authorize(reading, r); err != nil {
		return err
	}
	q := newQuery(r)
	list, err := s.readList(r, q)
	if err != nil {
		return err
	}
	home := s.newHome(r, "Short links")
	home.List = list
	for i := range list.Links {
		list.Links[i].MayWrite = home.MayWrite
		if list.Links[i].Code == q.values.Get("made") {
			home.Made = &list.Links[i]
		}
	}
	home.Form.Target.Value = q.values.Get("url")
	home.Form.Title.Value = q.values.Get("title")
	return writePage(w, http.StatusOK, "home", home)
}

// newHome returns a start page with an empty form and no list.
func (s *Server) newHome(r *http.Request, title string) homePage {
	home := homePage{
		frame:       newFrame(s.cfg, title),
		MayWrite:    s.authorize(writing, r) == nil,
		Bookmarklet: bookmarklet(s.cfg.BaseURL),
	}
	home.Form.Target.ID = "target"
	home.Form.Code.ID = "code"
	home.Form.Title.ID = "title"
	home.Form.Expires.ID = "expires"
	return home
}

// bookmarklet is a bookmark that opens the start page, filled with the page that one is on. The
// address of hop is the operator's, not a stranger's.
func bookmarklet(baseURL string) template.URL {
	return template.URL("javascript:location.href='" + template.JSEscapeString(baseURL) +
		"/?url='+encodeURIComponent(location.href)+'&title='+encodeURIComponent(document.title)")
}

// readList reads the links that q chooses, newest first.
func (s *Server) readList(r *http.Request, q *query) (*linkList, error) {
	for name, sent := range q.values { // a field of a form that was left empty chooses nothing
		if len(sent) == 1 && sent[0] == "" {
			q.values.Del(name)
		}
	}
	filter := linkFilter{
		active: q.flag("is_active"),
		search: q.text("q", checkSearch),
		sort:   byNewest,
	}
	part := page{limit: listedLinks, after: q.int("after", 0, maxID, 0)}
	if err := q.err(); err != nil {
		return nil, err
	}
	found, err := s.store.listCountedLinks(r.Context(), filter, part)
	if err != nil {
		return nil, err
	}
	list := &linkList{
		Query:    filter.search,
		States:   stateChoices(filter.active),
		Here:     listQueryString(q.values, part.after),
		Stopped:  found.stopped != 0,
		Filtered: filter.search != "" || filter.active != nil || part.after != 0,
		Paged:    part.after != 0,
	}
	next := found.stopped
	if found.more {
		next = found.lastID()
	}
	if next != 0 {
		list.Next = s.cfg.BasePath() + "/?" + listQueryString(q.values, next) + "#links"
	}
	now := time.Now()
	for _, l := range found.rows {
		list.Links = append(list.Links, s.listed(l, now))
	}
	return list, nil
}

// stateChoices are the choices of the filter for states.
func stateChoices(active *bool) []stateChoice {
	return []stateChoice{
		{"", "Any", active == nil},
		{"true", "Switched on", active != nil && *active},
		{"false", "Disabled", active != nil && !*active},
	}
}

// listQueryString is the query string of a page of the list: what chooses in values, and after.
func listQueryString(values url.Values, after int64) string {
	kept := url.Values{}
	for _, name := range []string{"q", "is_active"} {
		if values.Get(name) != "" {
			kept.Set(name, values.Get(name))
		}
	}
	if after != 0 {
		kept.Set("after", strconv.FormatInt(after, 10))
	}
	return kept.Encode()
}

// listed is l as the list shows it.
func (s *Server) listed(l countedLink, now time.Time) listedLink {
	row := listedLink{
		ID:       l.ID,
		Code:     l.ShortCode,
		ShortURL: s.shortURL(l.ShortCode),
		Target:   cutText(l.OriginalURL, listedTarget),
		Clicks:   l.ClickCount,
		Active:   l.IsActive,
		State:    stateOf(l.link, now),
		Created:  moment{l.CreatedAt.Time, now},
	}
	if l.Title != nil {
		row.Name = cutText(*l.Title, listedTitle)
	}
	return row
}

// stateOf is why a link leads nowhere, or "".
func stateOf(l link, now time.Time) string {
	switch {
	case !l.IsActive:
		return "disabled"
	case l.ExpiresAt != nil && !now.Before(l.ExpiresAt.Time):
		return "expired"
	}
	return ""
}

// ---- what forms get back ----

// orForm is an API route that makes a link, to which the form on the start page posts too. What a
// browser sends as a form is answered with pages.
func (s *Server) orForm(api handler) handler {
	return func(w http.ResponseWriter, r *http.Request) error {
		if takesPages(r) && mediaType(r) == "application/x-www-form-urlencoded" {
			return s.handleCreateForm(w, r)
		}
		return api(w, r)
	}
}

// handleCreateForm makes a link, which is then the first on the start page.
func (s *Server) handleCreateForm(w http.ResponseWriter, r *http.Request) error {
	f, err := readFieldsOrForm(w, r)
	if err != nil {
		return err
	}
	made, err := s.createLink(r, f)
	switch {
	case err != nil:
		return s.showForm(w, r, f, err)
	case s.cfg.HomeURL != "":
		return s.seeOther(w, "/"+made.ShortCode+"+")
	}
	return s.seeOther(w, "/?made="+made.ShortCode)
}

// showForm shows the form as it was filled in, and beside its fields why there is no link.
func (s *Server) showForm(w http.ResponseWriter, r *http.Request, f *fields, err error) error {
	w.(*answer).err = err // for the log
	api := asAPIError(err)
	home := s.newHome(r, "Not yet")
	form := &home.Form
	targetName, codeName := f.targetName(), f.codeName()
	form.Target.fill(f, targetName, api)
	form.Code.fill(f, codeName, api)
	form.Title.fill(f, "title", api)
	form.Expires.fill(f, "expires_at", api)
	switch {
	case errors.Is(err, errCodeTaken):
		form.Code.Problem = "was given out before: choose another"
	case form.faultless():
		form.Problem = sentence(api.Message)
	}
	if api.status == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", "1")
	}
	return writePage(w, api.status, "home", home)
}

// fill sets a field to what was typed and what is wrong with it.
func (field *formField) fill(f *fields, name string, api *apiError) {
	json.Unmarshal(f.raw[name], &field.Value) // an error leaves it empty: it was no text
	field.Problem = api.Fields[name]
}

// faultless says whether no field has a problem.
func (form *linkForm) faultless() bool {
	return form.Target.Problem == "" && form.Code.Problem == "" && form.Title.Problem == "" &&
		form.Expires.Problem == ""
}

// seeOther sends a browser on to a local page, after a form.
func (s *Server) seeOther(w http.ResponseWriter, local string) error {
	w.Header().Set("Location", s.cfg.BasePath()+local)
	w.WriteHeader(http.StatusSeeOther)
	return nil
}

// handleChangeForm is PATCH /urls/{id} for forms, which can only POST.
func (s *Server) handleChangeForm(w http.ResponseWriter, r *http.Request) error {
	f, err := readFieldsOrForm(w, r)
	if err != nil {
		return err
	}
	after, err := s.changeLink(r, f)
	if err != nil {
		return err
	}
	return s.seeOther(w, "/?"+backTo(f)+"#link-"+strconv.FormatInt(after.ID, 10))
}

// handleDeleteForm is DELETE /urls/{id} for forms.
func (s *Server) handleDeleteForm(w http.ResponseWriter, r *http.Request) error {
	f, err := readFieldsOrForm(w, r)
	if err != nil {
		return err
	}
	if _, err := s.removeLink(r); err != nil {
		return err
	}
	return s.seeOther(w, "/?"+backTo(f)+"#links")
}

// backTo is the query string of the list that a form was in. What else its field says is left out.
func backTo(f *fields) string {
	back, _ := f.str("back", false)
	values, err := url.ParseQuery(back)
	if err != nil {
		return ""
	}
	return listQueryString(values, parseID(values.Get("after")))
}

// ---- the page of a link ----

// linkInfo is what the template link shows.
type linkInfo struct {
	frame
	ShortURL  string
	Name      string // its title
	Target    targetParts
	Live      bool
	State     string       // why it leads nowhere, or ""
	Locked    bool         // its figures need a token
	NoFigures bool         // they cannot be read now
	Figures   *linkFigures // nil: locked, or unreadable
}

// targetParts is a target in pieces, so that its host can stand out.
type targetParts struct{ Before, Host, After string }

// splitAtHost takes a target apart.
func splitAtHost(target string) targetParts {
	scheme, rest, _ := strings.Cut(target, "://")
	end := len(rest)
	if at := strings.IndexAny(rest, "/?#"); at >= 0 {
		end = at
	}
	return targetParts{scheme + "://", rest[:end], rest[end:]}
}

// linkFigures are what is told of a link's clicks.
type linkFigures struct {
	Clicks    int64
	Bots      int64
	LastClick *moment
	Created   moment
	Expires   *moment
	Chart     *chart
	Referrers []hostCount
}

// handleCode follows a short link. For code+ it shows where the link leads instead.
func (s *Server) handleCode(w http.ResponseWriter, r *http.Request) error {
	err := s.handleRedirect(w, r)
	if err == nil {
		return nil
	}
	code, isPage := strings.CutSuffix(r.PathValue("code"), "+")
	if !isPage || !validCode(code) {
		return err
	}
	return s.showLink(w, r, code)
}

// showLink shows where a link leads: to everybody if it leads somewhere, and to who may read the
// list in any case, with its figures. ?figures asks strangers who they are.
func (s *Server) showLink(w http.ResponseWriter, r *http.Request, code string) error {
	info := linkInfo{frame: newFrame(s.cfg, code), ShortURL: s.shortURL(code)}
	w.Header().Set("X-Robots-Tag", "noindex")
	denied := s.authorize(reading, r)
	if denied != nil && r.URL.Query().Has("figures") {
		return denied
	}
	var err error
	if denied == nil {
		err = s.addFigures(r, &info, code)
	}
	if denied != nil || errors.Is(err, errUnavailable) || errors.Is(err, errOverloaded) {
		info.Locked = denied != nil
		info.NoFigures = err != nil
		err = s.addTarget(r, &info, code)
	}
	if err != nil {
		return err
	}
	return writePage(w, http.StatusOK, "link", info)
}

// addTarget says where a link leads as redirects know it: they need no database for it.
func (s *Server) addTarget(r *http.Request, info *linkInfo, code string) error {
	now := time.Now()
	t, err := s.cache.resolve(r.Context(), code, now)
	if err != nil {
		return err
	}
	if !t.live(now.Unix()) {
		return errNotFound
	}
	info.Live = true
	info.Target = splitAtHost(t.location[0])
	return nil
}

// addFigures says all that is known of a link, with every click answered before.
func (s *Server) addFigures(r *http.Request, info *linkInfo, code string) error {
	ctx, cancel := s.store.forOneAnswer(r.Context())
	defer cancel()
	if err := s.clicks.sync(ctx); err != nil {
		return err
	}
	st, err := s.store.stats(ctx, code)
	if err != nil {
		return err
	}
	now := time.Now()
	info.State = stateOf(st.link, now)
	info.Live = info.State == ""
	info.Target = splitAtHost(st.OriginalURL)
	if st.Title != nil {
		info.Name = *st.Title
	}
	info.Figures = &linkFigures{
		Clicks:    st.ClickCount,
		Bots:      st.BotClicks,
		Created:   moment{st.CreatedAt.Time, now},
		LastClick: momentOf(st.LastClickedAt, now),
		Expires:   momentOf(st.ExpiresAt, now),
		Chart:     newChart(st.ClicksPerDay, st.CreatedAt.Time, now),
		Referrers: st.TopReferrers,
	}
	return nil
}

// momentOf is a time that may be missing.
func momentOf(t *stamp, now time.Time) *moment {
	if t == nil {
		return nil
	}
	return &moment{t.Time, now}
}

// ---- the files of pages ----

// How long browsers keep the files of pages, in seconds. The addresses of style and script change
// with their content; the others stay.
const (
	keepVersioned = 365 * 24 * 60 * 60
	keepFixed     = 24 * 60 * 60
)

// handleStyle answers the stylesheet.
func (s *Server) handleStyle(w http.ResponseWriter, r *http.Request) error {
	writeFile(w, styleFile, keepFor(r))
	return nil
}

// handleScript answers the script of the copy buttons.
func (s *Server) handleScript(w http.ResponseWriter, r *http.Request) error {
	writeFile(w, scriptFile, keepFor(r))
	return nil
}

// keepFor is how long a file may be kept that was asked for with a version. Another version than
// this build's comes from a page of another replica during an upgrade: it must not be kept.
func keepFor(r *http.Request) int {
	if r.URL.Query().Get("v") != filesVersion {
		return 0
	}
	return keepVersioned
}

// handleIcon answers the icon.
func (s *Server) handleIcon(w http.ResponseWriter, _ *http.Request) error {
	writeFile(w, iconFile, keepFixed)
	return nil
}

// handleRobots tells crawlers what to read.
func (s *Server) handleRobots(w http.ResponseWriter, _ *http.Request) error {
	writeFile(w, robotsFile, keepFixed)
	return nil
}

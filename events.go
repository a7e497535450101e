package main

import "net/http"

// Events: what happened to links, and what clients report.

// handleListEvents lists events by url_id, user_id or event_type, every redirect answered before it included.
func (s *Server) handleListEvents(w http.ResponseWriter, r *http.Request) error {
	q := newQuery(r)
	p := q.page()
	var f filter
	q.filterInt(&f, "url_id")
	q.filterInt(&f, "user_id")
	if q.values.Has("event_type") {
		kind := q.values.Get("event_type")
		if err := checkName(kind); err != nil {
			q.refuse("event_type", err.Error())
		}
		f.and("event_type = ?", kind)
	}
	if err := q.err(); err != nil {
		return err
	}
	if err := s.clicks.sync(); err != nil {
		return err
	}
	events, err := list(s.store, "events", eventCols, f, p, eventDest)
	return writeList(w, r, events, p, err, func(e event) int64 { return e.ID })
}

// handleCreateEvent logs what a client reports of a link.
func (s *Server) handleCreateEvent(w http.ResponseWriter, r *http.Request) error {
	f, err := readFields(w, r)
	if err != nil {
		return err
	}
	kind, details := f.text("event_type", true, checkName), f.object("details")
	urlID, userID := f.id("url_id", true), f.id("user_id", false)
	if err := f.err(); err != nil {
		return err
	}
	e, err := s.store.createEvent(urlID, userID, kind, details)
	return respond(w, http.StatusCreated, e, err)
}

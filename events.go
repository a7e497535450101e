package main

import "net/http"

// Events: what happened to links, and what clients report.

// handleListEvents lists events by link, user or type. Every redirect that was answered before is
// among them.
func (s *Server) handleListEvents(w http.ResponseWriter, r *http.Request) error {
	q := newQuery(r)
	p := q.page()
	filter := eventFilter{
		urlID:     q.id("url_id"),
		userID:    q.id("user_id"),
		eventType: q.text("event_type", checkName),
	}
	if err := q.err(); err != nil {
		return err
	}
	ctx, cancel := s.store.forOneAnswer(r.Context())
	defer cancel()
	if err := s.clicks.sync(ctx); err != nil {
		return err
	}
	events, err := s.store.listEvents(ctx, filter, p)
	if err != nil {
		return err
	}
	return writeList(s, w, r, events)
}

// handleCreateEvent logs what a client reports of a link.
func (s *Server) handleCreateEvent(w http.ResponseWriter, r *http.Request) error {
	f, err := readFields(w, r)
	if err != nil {
		return err
	}
	eventType := f.text("event_type", true, checkName)
	details := f.object("details")
	urlID := f.id("url_id", true)
	userID := f.id("user_id", false)
	if err := f.err(); err != nil {
		return err
	}
	e, err := s.store.createEvent(r.Context(), urlID, userID, eventType, string(details))
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusCreated, e)
}

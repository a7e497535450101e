package main

import (
	"log/slog"
	"net/http"
	"slices"
)

// routes is the API's table of contents: what may be asked, by whom, and who answers. HEAD comes
// with every GET. What no line here matches is answered by answerRest.
func (s *Server) routes() []route {
	return []route{
		{"GET /{code}", public, s.handleCode},
		{"GET /urls/{code}/redirect", public, s.handleRedirect},

		{"POST /shorten", writing, s.orForm(s.handleShorten)},
		{"POST /shorten/bulk", writing, s.handleBulkLinks},
		{"GET /stats/{code}", reading, s.handleStats},

		{"GET /urls", reading, s.handleListLinks},
		{"POST /urls", writing, s.orForm(s.handleCreateLink)},
		{"POST /urls/bulk", writing, s.handleBulkLinks},
		{"GET /urls/{id}", reading, s.handleGetLink},
		{"PUT /urls/{id}", writing, s.handleUpdateLink},
		{"PATCH /urls/{id}", writing, s.handleUpdateLink},
		{"DELETE /urls/{id}", writing, s.handleDeleteLink},

		{"GET /users", reading, s.handleListUsers},
		{"POST /users", writing, s.handleCreateUser},
		{"POST /users/bulk", writing, s.handleBulkUsers},
		{"GET /users/{id}", reading, s.handleGetUser},
		{"PUT /users/{id}", writing, s.handleUpdateUser},
		{"DELETE /users/{id}", writing, s.handleDeleteUser},

		{"GET /events", reading, s.handleListEvents},
		{"POST /events", writing, s.handleCreateEvent},

		{"GET /health", public, s.handleHealth},
		{"GET /health/live", public, s.handleLive},
		{"GET /metrics", reading, s.handleMetrics},
		{"GET /openapi.json", public, s.handleOpenAPI},
	}
}

// pages are what people see in a browser, the forms that only browsers send, and what belongs to
// them. They are no part of the API.
func (s *Server) pages() []route {
	return []route{
		{"GET /{$}", public, s.handleHome},
		{"POST /urls/{id}", writing, s.handleChangeForm},
		{"POST /urls/{id}/delete", writing, s.handleDeleteForm},
		{"GET /style.css", public, s.handleStyle},
		{"GET /copy.js", public, s.handleScript},
		{"GET /favicon.ico", public, s.handleIcon},
		{"GET /robots.txt", public, s.handleRobots},
	}
}

// newServer wires the routes. The server is not ready until told.
func newServer(cfg Config, store *Store, cache *Cache, clicks *clickLog,
	log *slog.Logger) (*Server, error) {

	rules, err := newTargetRules(cfg.BaseURL, cfg.AllowPrivate)
	if err != nil {
		return nil, err
	}
	s := &Server{
		cfg:     cfg,
		store:   store,
		cache:   cache,
		clicks:  clicks,
		log:     log,
		mux:     http.NewServeMux(),
		cross:   http.NewCrossOriginProtection(),
		rules:   rules,
		creates: make(chan *creation, maxQueued),
	}
	s.inflight.max = int64(cfg.MaxInFlight)
	s.unread.max = maxUnread
	s.bodies.max = maxBodies
	if err := s.cross.AddTrustedOrigin(cfg.Origin()); err != nil {
		return nil, err
	}
	for _, rt := range slices.Concat(s.routes(), s.pages()) {
		s.mux.Handle(rt.pattern, s.adapt(rt))
	}
	s.mux.HandleFunc("/", s.answerRest)
	go s.createQueued()
	return s, nil
}

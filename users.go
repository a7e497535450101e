package main

import (
	"errors"
	"io"
	"mime"
	"net/http"
	"time"
)

// Users: the resource /users and its bulk load.

// handleListUsers lists users.
func (s *Server) handleListUsers(w http.ResponseWriter, r *http.Request) error {
	q := newQuery(r)
	p := q.page()
	if err := q.err(); err != nil {
		return err
	}
	users, err := list(s.store, "users", userCols, filter{}, p, userDest)
	return writeList(w, r, users, p, err, func(u user) int64 { return u.ID })
}

// handleGetUser answers one user.
func (s *Server) handleGetUser(w http.ResponseWriter, r *http.Request) error {
	u, err := s.store.user(pathID(r))
	return respond(w, http.StatusOK, u, err)
}

// handleCreateUser makes a user with a name and an e-mail nobody has.
func (s *Server) handleCreateUser(w http.ResponseWriter, r *http.Request) error {
	f, err := readFields(w, r)
	if err != nil {
		return err
	}
	name, email := f.text("username", true, checkName), f.text("email", true, checkEmail)
	if err := f.err(); err != nil {
		return err
	}
	u, err := s.store.createUser(name, email)
	return respond(w, http.StatusCreated, u, err)
}

// handleUpdateUser changes a name or an e-mail or both.
func (s *Server) handleUpdateUser(w http.ResponseWriter, r *http.Request) error {
	f, err := readFields(w, r)
	if err != nil {
		return err
	}
	name, email := f.text("username", f.has("username"), checkName), f.text("email", f.has("email"), checkEmail)
	if !f.has("username") && !f.has("email") {
		f.refuse("body", "must have username or email")
	}
	if err := f.err(); err != nil {
		return err
	}
	u, err := s.store.updateUser(pathID(r), name, email)
	return respond(w, http.StatusOK, u, err)
}

// handleDeleteUser removes a user; links and events stay.
func (s *Server) handleDeleteUser(w http.ResponseWriter, r *http.Request) error {
	return respond(w, http.StatusNoContent, nil, s.store.deleteUser(pathID(r)))
}

// handleBulkUsers loads a users.csv, multipart field "file" or the whole body: all rows or none, streamed.
func (s *Server) handleBulkUsers(w http.ResponseWriter, r *http.Request) error {
	const maxFile, maxTime = 64 << 20, backTimeout // about a million users; the server's own timeouts are for small bodies
	ctl := http.NewResponseController(w)
	ctl.SetReadDeadline(time.Now().Add(maxTime))
	ctl.SetWriteDeadline(time.Now().Add(maxTime))
	r.Body = http.MaxBytesReader(w, r.Body, maxFile)
	file, err := bulkFile(r)
	if err != nil {
		return err
	}
	n, err := s.store.loadUsers(bodyReader{file})
	if bad := (*rowError)(nil); errors.As(err, &bad) {
		err = &apiError{http.StatusBadRequest, "invalid_csv", bad.Error(), nil}
	}
	return respond(w, http.StatusCreated, map[string]int{"imported": n, "count": n}, err)
}

// bodyReader tells the client of a failed read: it must not look like the database's failure.
type bodyReader struct{ io.Reader }

func (b bodyReader) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	if err != nil && err != io.EOF {
		err = bodyError(err)
	}
	return n, err
}

// bulkFile finds the CSV in a request.
func bulkFile(r *http.Request) (io.Reader, error) {
	noFile := &apiError{http.StatusBadRequest, "no_file", `send a CSV as multipart/form-data field "file", or as a text/csv body`, nil}
	media, _, _ := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if media == "text/csv" {
		return r.Body, nil
	}
	form, err := r.MultipartReader()
	if err != nil {
		return nil, noFile
	}
	for {
		part, err := form.NextPart()
		if errors.As(err, new(*http.MaxBytesError)) {
			return nil, bodyError(err)
		} else if err != nil {
			return nil, noFile
		}
		if part.FormName() == "file" {
			return part, nil
		}
	}
}

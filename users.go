package main

import (
	"context"
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
	users, err := s.store.listUsers(r.Context(), p)
	if err != nil {
		return err
	}
	return writeList(s, w, r, users)
}

// handleGetUser answers one user.
func (s *Server) handleGetUser(w http.ResponseWriter, r *http.Request) error {
	u, err := s.store.user(r.Context(), pathID(r))
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, u)
}

// handleCreateUser makes a user with a name and an e-mail that nobody has.
func (s *Server) handleCreateUser(w http.ResponseWriter, r *http.Request) error {
	f, err := readFields(w, r)
	if err != nil {
		return err
	}
	name := f.text("username", true, checkName)
	email := f.text("email", true, checkEmail)
	if err := f.err(); err != nil {
		return err
	}
	u, err := s.store.createUser(r.Context(), name, email)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusCreated, u)
}

// handleUpdateUser changes a name or an e-mail or both.
func (s *Server) handleUpdateUser(w http.ResponseWriter, r *http.Request) error {
	f, err := readFields(w, r)
	if err != nil {
		return err
	}
	name := f.text("username", f.has("username"), checkName)
	email := f.text("email", f.has("email"), checkEmail)
	if !f.hasAny("username", "email") {
		f.refuse("body", "must have username or email")
	}
	if err := f.err(); err != nil {
		return err
	}
	u, err := s.store.updateUser(r.Context(), pathID(r), name, email)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, u)
}

// removeWithin is how long one request may go on removing a user. Hundreds of thousands of links
// and events fit in; asked again, the removal goes on where it stopped.
const removeWithin = 10 * time.Second

// handleDeleteUser removes a user; links and events stay.
func (s *Server) handleDeleteUser(w http.ResponseWriter, r *http.Request) error {
	ctx, cancel := context.WithTimeout(r.Context(), removeWithin)
	defer cancel()
	if err := s.store.deleteUser(ctx, pathID(r)); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// Limits of a bulk load.
const (
	maxUsersFile = 64 << 20         // bytes: about a million users
	fileWithin   = 30 * time.Second // for such a file to arrive; twice that with its loading
)

// handleBulkUsers loads a users.csv, multipart field "file" or the whole body: all rows or none.
func (s *Server) handleBulkUsers(w http.ResponseWriter, r *http.Request) error {
	control := http.NewResponseController(w)
	control.SetReadDeadline(time.Now().Add(fileWithin)) // the server's own is for small bodies
	control.SetWriteDeadline(time.Now().Add(2*fileWithin + time.Second))
	ctx, cancel := context.WithTimeout(r.Context(), 2*fileWithin)
	defer cancel()
	r.Body = http.MaxBytesReader(w, r.Body, maxUsersFile)
	file, err := bulkFile(r)
	if err != nil {
		return err
	}
	loaded, err := s.store.loadUsers(ctx, bodyReader{file})
	if bad, ok := errors.AsType[*rowError](err); ok {
		return badRequest("invalid_csv", bad.Error())
	}
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusCreated, loaded)
}

// bodyReader tells the client of a failed read: it must not look like the database's failure.
type bodyReader struct{ io.Reader }

// Read reads the body.
func (b bodyReader) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	if err != nil && err != io.EOF {
		err = bodyError(err)
	}
	return n, err
}

// errNoFile is the answer to a bulk load without a file.
var errNoFile = badRequest("no_file",
	`send a CSV as multipart/form-data field "file", or as a text/csv body`)

// bulkFile finds the CSV in a request.
func bulkFile(r *http.Request) (io.Reader, error) {
	media, _, _ := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if media == "text/csv" {
		return r.Body, nil
	}
	form, err := r.MultipartReader()
	if err != nil {
		return nil, errNoFile
	}
	for {
		part, err := form.NextPart()
		if err == io.EOF {
			return nil, errNoFile
		}
		if err != nil {
			return nil, bodyError(err)
		}
		if part.FormName() == "file" {
			return part, nil
		}
	}
}

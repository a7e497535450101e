package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"unicode/utf8"
)

// What JSON hop takes. encoding/json is lenient where leniency misleads: see checkJSON.

// Limits of what is read.
const (
	maxBody  = 16 << 10 // bytes of a body; the largest honest one is a target and a title
	maxBulk  = 1000     // items of one bulk request, also rows of one list
	maxDepth = 32       // levels of a JSON value: people's are shallow, attacks are deep
)

// badRequest is the answer to a request that makes no sense.
func badRequest(code, message string) *apiError {
	return &apiError{status: http.StatusBadRequest, Code: code, Message: message}
}

// checkJSON returns why text is not one JSON value as hop takes them, or nil. It is stricter than
// encoding/json, which repairs bad UTF-8 and lets the last of two equal names win: what one reader
// ignores another obeys.
func checkJSON(text []byte) error {
	if !utf8.Valid(text) {
		return errors.New("must be valid UTF-8")
	}
	if !json.Valid(text) {
		return errors.New("must be one JSON value")
	}
	c := jsonChecker{text: text}
	return c.value(0)
}

// jsonChecker walks over a valid JSON text once. Only numbers and names are looked at closely, so
// it costs about as much as json.Valid.
type jsonChecker struct {
	text []byte
	at   int // what stands before it has been checked
}

// value checks the value that comes next, which depth objects and arrays hold.
func (c *jsonChecker) value(depth int) error {
	switch first := c.next(); first {
	case '{', '[':
		return c.composite(depth+1, first == '{')
	case '"':
		_, err := c.str()
		return err
	case 't', 'n':
		c.at += len("true") // and null
	case 'f':
		c.at += len("false")
	default:
		return c.number()
	}
	return nil
}

// next moves to the next byte that is no blank and returns it.
func (c *jsonChecker) next() byte {
	for strings.IndexByte(" \t\r\n", c.text[c.at]) >= 0 {
		c.at++
	}
	return c.text[c.at]
}

// composite checks an object or an array, depth levels down, and what is in it.
func (c *jsonChecker) composite(depth int, isObject bool) error {
	if depth > maxDepth {
		return fmt.Errorf("must not be nested deeper than %d", maxDepth)
	}
	names := map[string]bool{}
	c.at++
	for {
		switch c.next() {
		case '}', ']':
			c.at++
			return nil
		case ',':
			c.at++
		}
		if isObject {
			c.next()
			name, err := c.str()
			if err != nil {
				return err
			}
			if names[name] {
				return fmt.Errorf("must not repeat the field %s", excerpt(name))
			}
			names[name] = true
			c.next()
			c.at++ // the colon
		}
		if err := c.value(depth); err != nil {
			return err
		}
	}
}

// str checks a string and returns it decoded.
func (c *jsonChecker) str() (string, error) {
	start := c.at
	escaped := false
	for c.at++; c.text[c.at] != '"'; c.at++ {
		if c.text[c.at] != '\\' {
			continue
		}
		escaped = true
		c.at++
		if c.text[c.at] != 'u' {
			continue
		}
		if err := c.unicodeEscape(); err != nil {
			return "", err
		}
	}
	c.at++
	literal := c.text[start:c.at]
	if !escaped {
		return string(literal[1 : len(literal)-1]), nil
	}
	var decoded string
	err := json.Unmarshal(literal, &decoded)
	return decoded, err
}

// unicodeEscape checks the \uXXXX at whose u the checker is, and the second one of a pair.
func (c *jsonChecker) unicodeEscape() error {
	unit := c.hex(c.at + 1)
	c.at += 4
	switch {
	case unit == 0:
		return errors.New("must not contain NUL")
	case unit < 0xd800 || unit > 0xdfff:
		return nil
	}
	isPair := unit < 0xdc00 && bytes.HasPrefix(c.text[c.at+1:], []byte(`\u`))
	if isPair {
		low := c.hex(c.at + 3)
		isPair = 0xdc00 <= low && low <= 0xdfff
	}
	if !isPair {
		return fmt.Errorf(`must not contain \u%x without the other half of its pair`, unit)
	}
	c.at += 6
	return nil
}

// hex reads four hexadecimal digits.
func (c *jsonChecker) hex(at int) uint64 {
	unit, _ := strconv.ParseUint(string(c.text[at:at+4]), 16, 16) // the text is valid
	return unit
}

// number checks that a number is none that readers round to infinity or to nothing. One of fewer
// than 300 characters can be so only by its exponent.
func (c *jsonChecker) number() error {
	start := c.at
	for c.at < len(c.text) && strings.IndexByte("+-.eE0123456789", c.text[c.at]) >= 0 {
		c.at++
	}
	literal := c.text[start:c.at]
	exponent := bytes.IndexAny(literal, "eE")
	if exponent < 0 && len(literal) < 300 {
		return nil
	}
	mantissa := literal
	if exponent >= 0 {
		mantissa = literal[:exponent]
	}
	n, err := strconv.ParseFloat(string(literal), 64)
	isLost := n == 0 && bytes.ContainsAny(mantissa, "123456789")
	if err != nil || isLost {
		return fmt.Errorf("must not contain the number %s, which is too large or too small",
			strings.Trim(excerpt(string(literal)), `"`))
	}
	return nil
}

// splitArray cuts a JSON array into its items without reading them: it only counts brackets, quotes
// and commas, at 1 ns a byte, and stops at the first item that is too many or too large. The array
// is valid JSON if each item is. Errors are apiErrors.
func splitArray(text []byte) ([]json.RawMessage, error) {
	noArray := badRequest("invalid_json", "the body must be a JSON array")
	wrongCount := badRequest("invalid_request",
		fmt.Sprintf("the body must be an array of 1 to %d items", maxBulk))
	text = bytes.TrimSpace(text)
	if len(text) < 2 || text[0] != '[' || text[len(text)-1] != ']' {
		return nil, noArray
	}
	if len(bytes.TrimSpace(text[1:len(text)-1])) == 0 {
		return nil, wrongCount
	}
	var items []json.RawMessage
	depth := 0
	inString := false
	start := 1 // of the item
	for i := 1; i < len(text); i++ {
		if len(items) == maxBulk {
			return nil, wrongCount
		}
		if i-start > maxBody {
			return nil, badRequest("invalid_request",
				fmt.Sprintf("each item must be at most %d bytes", maxBody))
		}
		c := text[i]
		switch {
		case inString && c == '\\':
			i++ // whatever is escaped does not end the string
		case c == '"':
			inString = !inString
		case inString:
		case depth == 0 && (c == ',' || c == ']'):
			items = append(items, bytes.TrimSpace(text[start:i]))
			start = i + 1
			if c == ']' && start < len(text) {
				return nil, noArray
			}
		case c == '{' || c == '[':
			depth++
		case c == '}' || c == ']':
			depth--
		}
	}
	if start != len(text) {
		return nil, noArray
	}
	return items, nil
}
